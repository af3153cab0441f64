"use strict";
// Two dumps against each other: what differs in settings, figures, refusals and the rewritten graphs.
M.compareTab = (app) => {
  const d = app.dump.difference;
  const found = d.graphs[app.dump.graphs.indexOf(app.graph)];
  const cell = (a, b) => (a === b ? [M.h("td", {}, a), M.h("td.muted", {}, "the same")] : [M.h("td.less", {}, a), M.h("td.more", {}, b)]);
  const rows = (pairs) => Object.entries(pairs).map(([k, [a, b]]) => M.h("tr", {}, M.h("th", {}, k), cell(a, b)));
  const list = (title, items) => items.length ? M.h("section.box", {}, M.h("h3", {}, title), M.h("ul", {}, items.map((i) => M.h("li", {}, i)))) : null;
  return { root: M.h("section.page.wide", { role: "tabpanel" }, M.h("h2", {}, "Compared"),
    M.h("table", {}, M.h("thead", {}, M.h("tr", {}, M.h("th", {}, ""), M.h("th", {}, `A: ${d.a}`), M.h("th", {}, `B: ${d.b}`))), M.h("tbody", {}, rows(d.settings), found ? rows(found.figures) : null)),
    found ? [list("Refused in A only", found.only_a), list("Refused in B only", found.only_b), difference(found.text)] : null) };
};

function difference(text) {
  if (!text) return M.h("p.muted", {}, "The rewritten graphs are the same.");
  const kind = (l) => (l.startsWith("+") ? "more" : l.startsWith("-") ? "less" : l.startsWith("@") ? "muted" : "");
  return M.h("pre.text", {}, text.split("\n").slice(0, 4000).map((l) => M.h("span", { class: kind(l) }, `${l}\n`)));
}
