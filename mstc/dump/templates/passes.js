"use strict";
// Each pass: what it changed, side by side, the changed nodes marked.
const MOST_DRAWN = 160; // nodes of one change; more are only counted

M.passesTab = (app) => {
  const g = app.graph;
  const stages = g.stages.slice(1);
  const state = { stage: Math.max(0, stages.findIndex((s) => s.changed)), site: 0, view: "both" };
  const list = M.h("nav.passes", { "aria-label": "passes" });
  const body = M.h("div.stage");
  const root = M.h("section.split", { role: "tabpanel" }, list, body);
  if (!stages.length) {
    M.clear(root, M.h("p.empty", {}, g.stages.length ? "No pass ran on this graph: it was left as it came. See why not." : "The graphs of this report were not recorded. Use mstc.explain, mstc dump or options={\"dump\": folder}."));
    return { root };
  }
  const choose = (change) => { Object.assign(state, change); show(); };
  const show = () => {
    M.clear(list, stages.map((s, i) => entry(g, s, i, state, () => choose({ stage: i, site: 0 }))));
    M.clear(body, passBody(app, stages[state.stage], g.stages[state.stage], state, choose));
  };
  show();
  return { root };
};

function entry(g, s, i, state, onclick) {
  const sites = s.edits.length;
  return M.h("button.pass", { onclick, class: s.changed ? "" : "idle", "aria-current": i === state.stage ? "true" : null },
    M.h("b", {}, s.name), M.h("small", {}, sites ? M.count(sites, "edit") : s.refusals.length ? `${s.refusals.length} refused` : "nothing to do", ` · ${M.seconds(s.seconds)}`));
}

function passBody(app, after, before, state, choose) {
  const change = compare(before, after);
  const sites = [...M.group(attribute(after.edits, change), (s) => s.look).values()];
  const head = M.h("div.head", {}, M.h("h2", {}, after.name), M.fidelity(after.fidelity), M.h("span.muted", {}, M.seconds(after.seconds)));
  const refused = after.refusals.length ? M.h("p.muted", {}, `${M.count(after.refusals.length, "candidate")} refused: see why not.`) : null;
  if (!sites.length) return [head, M.h("p.empty", {}, "This pass changed nothing in this graph."), refused];
  const chosen = sites[Math.min(state.site, sites.length - 1)];
  const views = [["both", "Side by side"], ["before", "Before"], ["after", "After"], ["text", "Text"]];
  return [head, counts(before, after), refused,
    sites.length > 1 || chosen.length > 1 ? M.h("div.sites", {}, sites.map((found, i) => M.h("button.site", { onclick: () => choose({ site: i }), "aria-pressed": String(found === chosen) },
      found[0].what, found.length > 1 ? M.h("i.stack", {}, `×${found.length}`) : null))) : M.h("p.what", {}, chosen[0].what),
    M.h("div.switch", { role: "group", "aria-label": "view" }, views.map(([id, text]) => M.h("button", { "data-view": id, "aria-pressed": String(state.view === id), onclick: () => choose({ view: id }) }, text))),
    siteView(app, chosen[0], state.view)];
}

function counts(before, after) {
  const number = (nodes) => { const c = new Map(); for (const n of nodes) if (n.kind === "op") c.set(n.op, (c.get(n.op) || 0) + 1); return c; };
  const [a, b] = [number(before.nodes), number(after.nodes)];
  const ops = [...new Set([...a.keys(), ...b.keys()])].map((op) => [op, (b.get(op) || 0) - (a.get(op) || 0)]).filter(([, d]) => d).sort((x, y) => x[1] - y[1]);
  const shown = [...ops.filter(([, d]) => d > 0), ...ops.filter(([, d]) => d < 0)];
  const one = ([op, d]) => M.h("span.delta", { class: d > 0 ? "more" : "less" }, `${d > 0 ? "+" : "−"}${Math.abs(d)} ${op.replace(/^aten\./, "")}`);
  return M.h("div.counts", {}, M.h("span", {}, `${before.nodes.length} → ${after.nodes.length} nodes`), shown.slice(0, 14).map(one), shown.length > 14 ? M.h("span.muted", {}, `and ${shown.length - 14} more ops`) : null);
}

// The nodes that went, came, or read something else than before.
function compare(before, after) {
  const [a, b] = [before, after].map((s) => new Map(s.nodes.map((n) => [n.name, n])));
  const gone = new Set([...a.keys()].filter((n) => !b.has(n)));
  const come = new Set([...b.keys()].filter((n) => !a.has(n)));
  const rewired = new Set([...b].filter(([n, node]) => a.has(n) && a.get(n) !== node && node.kind !== "output").map(([n]) => n));
  return { a, b, gone, come, rewired };
}

// Which changed nodes belong to which edit: those that it names, and the changed ones that they lead to.
function attribute(edits, change) {
  const owner = new Map();
  const near = new Map();
  const changed = (n) => change.gone.has(n) || change.come.has(n) || change.rewired.has(n);
  for (const side of [change.a, change.b]) for (const node of side.values()) if (changed(node.name)) for (const i of node.inputs) if (changed(i)) {
    near.set(i, [...(near.get(i) || []), node.name]);
    near.set(node.name, [...(near.get(node.name) || []), i]);
  }
  edits.forEach((e, i) => [...e.added, ...e.removed].forEach((n) => owner.set(n, i)));
  const queue = [...owner.keys()];
  while (queue.length) {
    const n = queue.shift();
    for (const m of near.get(n) || []) if (!owner.has(m) && !change.rewired.has(m)) { owner.set(m, owner.get(n)); queue.push(m); }
  }
  if (edits.length === 1) for (const n of [...change.gone, ...change.come, ...change.rewired]) if (!owner.has(n)) owner.set(n, 0);
  for (const n of change.rewired) if (!owner.has(n)) { const o = (near.get(n) || []).map((m) => owner.get(m)).find((x) => x !== undefined); if (o !== undefined) owner.set(n, o); }
  const parts = edits.map(() => ({ gone: [], come: [], rewired: [] }));
  for (const kind of ["gone", "come", "rewired"]) for (const n of change[kind]) if (owner.has(n)) parts[owner.get(n)][kind].push(n);
  const ops = (names, side) => names.map((n) => (side.get(n) || { op: "" }).op).join(" ");
  const look = (e) => [e.what.replace(/\b\w+_\d+\b/g, "_"), ops(e.removed, change.a), ops(e.added, change.b)].join("|");
  return edits.map((e, i) => ({ what: e.what, ...parts[i], change, edit: e, look: look(e) }));
}

function siteView(app, site, view) {
  const { change } = site;
  const named = site.edit.added.filter((n) => change.b.has(n) && !change.come.has(n) && !site.rewired.includes(n));
  const was = [...site.gone, ...site.rewired, ...named].map((n) => change.a.get(n)).filter(Boolean);
  const is = [...site.come, ...site.rewired, ...named].map((n) => change.b.get(n)).filter(Boolean);
  if (view === "text") return textView(site, was, is);
  const half = (title, nodes, side, mark) => {
    const order = new Map([...side.keys()].map((n, i) => [n, i]));
    nodes.sort((x, y) => order.get(x.name) - order.get(y.name));
    const shown = nodes.slice(0, MOST_DRAWN);
    const { items, edges } = M.opGraph(app.graph, shown, (n) => (change.a.get(n.name) === change.b.get(n.name) || site.rewired.includes(n.name) ? "changed" : mark), app.detail.node, (n) => side.get(n));
    const note = nodes.length > shown.length ? `, the first ${shown.length} drawn` : "";
    const canvas = items.length ? M.draw(items, edges, [], { label: title, layout: { nodesep: 14, ranksep: 24 }, least: 0.35 }).view : M.h("p.empty", {}, "nothing");
    return M.h("figure.half", { class: title.toLowerCase() }, M.h("figcaption", {}, M.h("b", {}, title), ` ${M.count(nodes.length, "changed node")}${note}`), canvas);
  };
  return M.h("div.halves", { class: view }, view !== "after" ? half("Before", was, change.a, "removed") : null, view !== "before" ? half("After", is, change.b, "added") : null);
}

function textView(site, was, is) {
  const line = (n) => `${n.name} = ${n.kind === "op" ? `${n.op}(${n.args})` : n.kind}${n.value ? ` : ${n.value}` : ""}`;
  return M.h("pre.text", {}, was.map((n) => M.h("span.less", {}, `- ${line(n)}\n`)), is.map((n) => M.h("span.more", {}, `+ ${line(n)}\n`)));
}
