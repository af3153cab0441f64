"use strict";
// Why not: every candidate that was left as it was, and what would make it work.
M.refusalsTab = (app) => {
  const g = app.graph;
  const ended = g.refusals.length ? null : M.h("p.empty", {}, "Nothing was refused in this graph.");
  const groups = [...M.group(g.refusals, (r) => `${r.pass_name}\n${r.reason}\n${r.remedy}`).values()];
  return { root: M.h("section.page", { role: "tabpanel" }, M.h("h2", {}, "Why not"), M.h("p.muted", {}, "Candidates that a pass looked at and left as they were."), ended, groups.map((found) => refusal(app, found))) };
};

function refusal(app, found) {
  const [r] = found;
  const where = found.slice(0, 12).map((x) => M.h("li", {}, x.node ? M.h("button.link.mono", { onclick: () => app.reveal(x.node) }, x.node) : null,
    x.source ? M.h("span.muted", { title: x.source }, ` ${M.place(x.source)}`) : null));
  return M.h("article.refusal", {}, M.h("h3", {}, M.h("span.chip", {}, r.pass_name), found.length > 1 ? M.h("i.stack", {}, `×${found.length}`) : null),
    M.h("p.reason", {}, r.reason), r.remedy ? M.h("p.remedy", {}, M.h("b", {}, "What would make it work: "), r.remedy) : null,
    M.h("ul.where", {}, where, found.length > 12 ? M.h("li.muted", {}, `and ${found.length - 12} more`) : null));
}
