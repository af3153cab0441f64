"use strict";
// The options in force, versions, times, the plan, and the command that gives this dump again.
M.aboutTab = (app) => {
  const { dump, graph } = app;
  const pairs = (title, values) => Object.keys(values).length ? M.h("section.box", {}, M.h("h3", {}, title), M.h("dl", {}, Object.entries(values).map(([k, v]) => [M.h("dt.mono", {}, k), M.h("dd.mono", {}, typeof v === "string" ? v : JSON.stringify(v))]))) : null;
  const copy = M.h("button.quiet", { onclick: () => navigator.clipboard && navigator.clipboard.writeText(dump.command).then(() => { copy.textContent = "Copied"; }) }, "Copy");
  const times = Object.fromEntries(Object.entries(graph ? graph.timings : {}).map(([k, v]) => [k, M.seconds(v)]));
  return { root: M.h("section.page", { role: "tabpanel" }, M.h("h2", {}, "About this dump"),
    M.h("div.command", {}, M.h("code", {}, dump.command), copy),
    M.h("div.boxes", {}, pairs("Options in force", dump.options), pairs("Versions", dump.versions), pairs("Time", { ...times, "all graphs": M.seconds(dump.seconds) })),
    graph && graph.plan.length ? M.h("section.box", {}, M.h("h3", {}, "Plan"), M.h("ul", {}, graph.plan.map((p) => M.h("li", {}, p)))) : null) };
};
