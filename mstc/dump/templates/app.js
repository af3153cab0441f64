"use strict";
// Puts the page together: graphs, tabs, the panel, the search.
(() => {
  const dump = M.read();
  const app = { dump, graph: dump.graphs[0] || null };
  const main = document.getElementById("main");
  const bar = document.getElementById("tabs");
  let tabs = [];
  let current = null;

  const make = () => {
    const g = app.graph;
    const badge = g && g.refusals.length ? g.refusals.length : "";
    const all = [["model", "Model", M.modelTab], ["passes", "Passes", M.passesTab], ["whynot", "Why not", M.refusalsTab, badge], ["memory", "Memory", M.memoryTab],
      ["about", "About", M.aboutTab], ...(dump.difference ? [["compare", "Compare", M.compareTab]] : [])];
    tabs = all.filter(([id]) => g || id === "about").map(([id, text, build, mark]) => ({ id, text, build, mark, made: null }));
  };
  const choose = (id, focus) => {
    current = tabs.find((t) => t.id === id) || tabs[0];
    current.made = current.made || current.build(app);
    app.detail.hide();
    M.clear(main, app.graph ? null : M.h("p.empty", {}, "No graph was captured: the function calls no tensor operator."), ended(app.graph), current.made.root);
    M.clear(bar, tabs.map((t) => M.h("button", { role: "tab", "data-tab": t.id, "aria-selected": String(t === current), tabindex: t === current ? "0" : "-1", onclick: () => choose(t.id) }, t.text, t.mark ? M.h("i", {}, String(t.mark)) : null)));
    if (focus) bar.querySelector("[aria-selected=true]").focus();
  };
  const ended = (g) => (g && g.broken ? M.h("p.broken", {}, M.h("b", {}, "Graph break. "), g.broken) : null);

  app.reveal = (name) => {
    const node = app.graph.byName.get(name);
    if (!node) return;
    choose("model");
    current.made.reveal(name);
    app.detail.node(node);
  };
  app.detail = M.detail(document.getElementById("detail"), app);

  const graphs = document.getElementById("graphs");
  const pick = (g) => {
    app.graph = g;
    if (dump.graphs.length > 1) M.clear(graphs, dump.graphs.map((x) => M.h("button", { "aria-pressed": String(x === g), onclick: () => pick(x) }, x.name)));
    make();
    choose(current ? current.id : "model");
  };

  bar.addEventListener("keydown", (e) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
    if (step) choose(tabs[(tabs.indexOf(current) + step + tabs.length) % tabs.length].id, true);
  });
  document.getElementById("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  document.addEventListener("keydown", (e) => { if (e.key === "Escape") app.detail.hide(); });
  pick(app.graph);
  M.search(app);
  document.documentElement.dataset.ready = "true";
})();
