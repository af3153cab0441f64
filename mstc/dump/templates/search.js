"use strict";
// Finds nodes by name, op, module, input name, value or source line, in the captured and the rewritten graph.
const MOST_HITS = 40;

M.search = (app) => {
  const input = document.getElementById("search");
  const list = document.getElementById("hits");
  let hits = [];
  let chosen = 0;

  const find = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    hits = words.length ? nodes(app.graph).filter((n) => words.every((w) => n.haystack.includes(w))).slice(0, MOST_HITS) : [];
    chosen = 0;
    show(words.length > 0);
  };
  const show = (open) => {
    list.hidden = !open;
    M.clear(list, hits.length ? hits.map((n, i) => M.h("li", { class: i === chosen ? "chosen" : "", onmousedown: (e) => { e.preventDefault(); take(n); } },
      M.h("b.mono", {}, n.title || n.name), M.h("span", {}, n.kind === "op" ? n.op : n.kind), M.h("small", {}, n.module || n.value))) : M.h("li.muted", {}, "nothing found"));
  };
  const take = (n) => { list.hidden = true; app.reveal(n.name); };
  input.addEventListener("input", find);
  input.addEventListener("focus", () => { if (input.value) find(); });
  input.addEventListener("blur", () => { list.hidden = true; });
  input.addEventListener("keydown", (e) => {
    if (e.key === "Enter" && hits.length) take(hits[chosen]);
    else if (e.key === "Escape") { input.value = ""; list.hidden = true; input.blur(); }
    else if (e.key === "ArrowDown" || e.key === "ArrowUp") {
      chosen = Math.max(0, Math.min(hits.length - 1, chosen + (e.key === "ArrowDown" ? 1 : -1)));
      show(true);
      list.children[chosen].scrollIntoView({ block: "nearest" });
    } else return;
    e.preventDefault();
  });
  document.addEventListener("keydown", (e) => {
    if (e.key === "/" && !/^(INPUT|TEXTAREA)$/.test(document.activeElement.tagName)) { e.preventDefault(); input.select(); input.focus(); }
  });
};

// Every node that the page knows, with the text in which it is searched for.
function nodes(g) {
  if (!g) return [];
  if (!g.found) {
    g.found = [...g.byName.values()].filter((n) => n.kind !== "output");
    for (const n of g.found) n.haystack = [n.name, n.op, n.title, n.module, n.value, n.source].join(" ").toLowerCase();
  }
  return g.found;
}
