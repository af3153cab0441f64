"use strict";
// The panel on the right: one block or one node, with the user's own line.
M.detail = (panel, app) => {
  const show = (...children) => {
    panel.hidden = false;
    document.body.classList.add("with-detail");
    M.clear(panel, M.h("button.quiet.close", { onclick: hide, "aria-label": "Close" }, "×"), children);
  };
  const hide = () => { panel.hidden = true; document.body.classList.remove("with-detail"); };
  const rows = (pairs) => M.h("dl", {}, pairs.filter(([, v]) => v !== "" && v !== null && v !== undefined && v !== false).map(([k, v]) => [M.h("dt", {}, k), M.h("dd", {}, v)]));
  const line = (source, code) => source ? M.h("div.source", {}, M.h("span", { title: source }, M.place(source)), code ? M.h("code", {}, code) : null) : null;
  const link = (name) => M.h("button.link", { onclick: () => app.reveal(name) }, name);
  const links = (names) => M.h("span.links", {}, [...names].slice(0, 60).map(link), names.length > 60 ? ` and ${names.length - 60} more` : null);
  const refusals = (found) => found.map((r) => M.h("div.why", {}, M.h("b", {}, `${r.pass_name}: left as it was`), M.h("p", {}, r.reason),
    r.remedy ? M.h("p.remedy", {}, r.remedy) : null));

  const block = (b) => {
    const g = app.graph;
    const nodes = M.blockNodes(g, b);
    const first = nodes.find((n) => n.source === b.source);
    show(M.h("h2", {}, b.label), M.status(b.status), M.h("p", {}, M.STATUS[b.status][1], "."), refusals(M.blockRefusals(g, b)),
      rows([["module", b.module], ["layer", b.layer === null ? "" : String(b.layer)], ["tokens", b.tokens], ["chunks", b.chunks > 1 ? String(b.chunks) : ""],
        ["work", b.flops ? `${M.flops(b.flops)} in the forward` : ""], ["makes", b.nbytes ? M.bytes(b.nbytes) : ""],
        ["at once", b.chunks > 1 ? `${M.bytes(b.held)}, one chunk's` : ""], ["keeps", b.saved.join(", ")], ["note", b.note], ["nodes", M.count(nodes.length, "node")]]),
      line(b.source, first && first.code));
  };

  const node = (n) => {
    const g = app.graph;
    const users = [...(g.users.get(n.name) || [])];
    const touched = g.stages.filter((s) => s.edits.some((e) => e.added.includes(n.name) || e.removed.includes(n.name))).map((s) => s.name);
    show(M.h("h2.mono", {}, n.name), M.h("p.mono", {}, n.kind === "op" ? n.op : `${n.kind} ${n.title}`), refusals(g.refusedBy.get(n.name) || []),
      rows([["value", n.value], ["size", n.nbytes ? M.bytes(n.nbytes) : ""], ["work", n.flops ? M.flops(n.flops) : ""], ["gradient", n.grad ? "needed" : ""],
        ["module", n.module], ["arguments", n.args ? M.h("code", {}, n.args) : ""], ["reads", n.inputs.length ? links(n.inputs) : ""],
        ["read by", users.length ? links(users) : ""], ["changed by", touched.join(", ")]]),
      line(n.source, n.code));
  };
  return { block, node, hide };
};
