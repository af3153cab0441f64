"use strict";
// The model at a glance: blocks in order, identical layers folded; a block opens down to its nodes.
const CARD = { width: 384, height: 78 };
const MOST_NODES = 240; // drawn at once; a larger block is leafed through

M.modelTab = (app) => {
  const state = { unfolded: new Set(), open: null, page: 0 };
  const stage = M.h("div.stage");
  const root = M.h("section.model", { role: "tabpanel" }, figures(app.graph), stage);
  let canvas = null;

  const show = () => {
    root.classList.toggle("opened", state.open !== null);
    if (!app.graph.blocks.length) return M.clear(stage, M.h("p.empty", {}, "This graph holds no operator."));
    const drawn = state.open === null ? drawBlocks(app, state, actions) : drawNodes(app, state, actions);
    canvas = drawn.canvas;
    M.clear(stage, drawn.head, canvas.view, state.open === null ? legend(app.graph) : null);
  };
  const actions = {
    open: (i) => { state.open = i; state.page = 0; show(); app.detail.block(app.graph.blocks[i]); },
    close: () => { const i = state.open; state.open = null; show(); app.detail.hide(); canvas.centre(shownAs(app.graph, state, i)); },
    toggle: (f) => { if (!state.unfolded.delete(f.start)) state.unfolded.add(f.start); show(); },
    leaf: (page) => { state.page = page; show(); },
    node: (n) => app.detail.node(n),
  };
  root.addEventListener("keydown", (e) => {
    if (e.key === "Escape" && state.open !== null) { actions.close(); e.stopPropagation(); }
  });
  show();

  // Bring a node into view, in its block; an input that no block holds beside the first that reads it.
  const reveal = (wanted) => {
    const g = app.graph;
    const name = g.blockOf.has(wanted) ? wanted : [...(g.users.get(wanted) || [])].find((n) => g.blockOf.has(n));
    if (name === undefined) return;
    const i = g.blockOf.get(name);
    const nodes = M.blockNodes(app.graph, app.graph.blocks[i]);
    const at = nodes.findIndex((n) => n.name === name);
    Object.assign(state, { open: i, page: Math.max(0, Math.floor(at / MOST_NODES)) });
    show();
    requestAnimationFrame(() => canvas.centre(`${wanted} > ${name}`) || canvas.centre(wanted) || canvas.centre(name));
  };
  return { root, reveal, open: actions.open };
};

function figures(g) {
  const before = M.peak(g.before);
  const after = M.peak(g.after);
  const happened = M.group(g.blocks, (b) => b.status);
  const cut = before ? Math.round((1 - after / before) * 100) : 0;
  const figure = (name, value, note, props) => M.h("div.figure", props || {}, M.h("span", {}, name), M.h("b", {}, value), M.h("small", {}, note || ""));
  const looped = ["chunked", "loss", "recomputed"].reduce((n, s) => n + (happened.get(s) || []).length, 0);
  return M.h("div.figures", {},
    before ? figure("predicted peak of one step", M.bytes(after), `${M.bytes(before)} as written${cut > 0 ? `, ${cut}% less` : ""}`, { class: cut > 0 ? "good" : "" }) : null,
    figure("runs in chunks", M.count(looped, "block"), `of ${M.count(g.blocks.length, "block")}`),
    figure("nodes", g.last.length.toLocaleString("en-US"), `${g.first.length.toLocaleString("en-US")} as captured`),
    figure("numbers", M.FIDELITY[g.fidelity], g.training ? "forward and backward" : "forward only"),
    figure("refused", String(g.refusals.length), g.refusals.length ? "see why not" : "nothing", { class: g.refusals.length ? "warn" : "" }));
}

function legend(g) {
  const found = M.group(g.blocks, (b) => b.status);
  return M.h("div.legend", {}, Object.keys(M.STATUS).filter((s) => found.has(s)).map((s) =>
    M.h("span", { title: M.STATUS[s][1] }, M.h("i", { class: `status ${s}` }), `${M.STATUS[s][0]} ${found.get(s).length}`)));
}

// The block that stands for block i on the page: in a fold, the one of the first layer.
const shownAs = (g, state, i) => {
  const fold = g.foldAt(i);
  return fold && !state.unfolded.has(fold.start) ? `b${fold.start + ((i - fold.start) % fold.period)}` : `b${i}`;
};

function drawBlocks(app, state, actions) {
  const g = app.graph;
  const items = [];
  const edges = new Map();
  const clusters = [];
  g.blocks.forEach((b, i) => {
    const id = shownAs(g, state, i);
    const fold = g.foldAt(i);
    const layer = fold ? Math.floor((i - fold.start) / fold.period) : 0;
    if (id === `b${i}`) {
      const parent = fold ? `f${fold.start}.${layer}` : undefined;
      const folded = fold && !state.unfolded.has(fold.start);
      items.push({ id, ...CARD, parent, element: card(b, folded, () => actions.open(i)) });
    }
    if (fold && (i - fold.start) % fold.period === 0 && (layer === 0 || state.unfolded.has(fold.start))) {
      clusters.push({ id: `f${fold.start}.${layer}`, element: frame(fold, layer, state, actions) });
    }
    for (const from of b.inputs) {
      const [a, z] = [shownAs(g, state, from), id];
      // Within a fold the way from one layer to the next would lead back up: the frame says that it repeats.
      if (a !== z && Number(a.slice(1)) < Number(z.slice(1))) edges.set(`${a} ${z}`, { from: a, to: z });
    }
  });
  const canvas = M.draw(items, [...edges.values()], clusters, { label: "the model", least: 0.45 });
  return { canvas, head: M.h("p.hint", {}, "Click a block to open it. Scroll to zoom, drag to move, / to find, 0 to fit.") };
}

function card(b, folded, onopen) {
  const name = b.layer !== null && !folded ? `layer ${b.layer}` : b.module;
  const each = Math.ceil(Number(b.tokens) / b.chunks);
  const facts = [b.chunks > 1 ? `${b.chunks} × ${each ? `${each} tokens` : "chunks"}` : b.tokens ? `${b.tokens} tokens` : null, b.flops ? M.flops(b.flops) : null,
    b.nbytes ? (b.chunks > 1 ? `${M.bytes(b.nbytes)} → ${M.bytes(b.held)}` : M.bytes(b.nbytes)) : null];
  return M.h("button.card", { class: `status ${b.status} ${b.kind}`, title: `${b.label}\n${M.STATUS[b.status][1]}`, "data-block": b.index, onclick: onopen },
    M.h("b", {}, b.label), M.h("span", {}, facts.filter(Boolean).join(" · ")),
    M.h("small", {}, M.STATUS[b.status][0], name ? ` · ${name}` : ""));
}

function frame(fold, layer, state, actions) {
  const folded = !state.unfolded.has(fold.start);
  const text = folded ? `${fold.count} identical layers` : `${layer + 1} of ${fold.count}`;
  return M.h("div.frame", { class: folded ? "folded" : "" }, M.h("span", {}, text),
    layer === 0 ? M.h("button.fold", { onclick: () => actions.toggle(fold), "aria-expanded": String(!folded) }, folded ? "Expand" : "Fold") : null);
}

function drawNodes(app, state, actions) {
  const g = app.graph;
  const block = g.blocks[state.open];
  const all = M.blockNodes(g, block);
  const nodes = all.slice(state.page * MOST_NODES, (state.page + 1) * MOST_NODES);
  const refused = new Set(g.refusals.map((r) => r.node));
  const { items, edges } = M.opGraph(g, nodes, (n) => (refused.has(n.name) ? "refused" : ""), actions.node, (name) => g.byName.get(name));
  const canvas = M.draw(items, edges, [], { label: block.label, layout: { nodesep: 16, ranksep: 26 }, least: 0.65 });
  return { canvas, head: crumbs(g, block, all, state, actions) };
}

function crumbs(g, block, all, state, actions) {
  const fold = g.foldAt(block.index);
  const pages = Math.ceil(all.length / MOST_NODES);
  const step = (text, title, able, act) => M.h("button.quiet", { title, "aria-label": title, disabled: !able, onclick: act }, text);
  const layer = fold ? Math.floor((block.index - fold.start) / fold.period) : 0;
  return M.h("div.crumbs", {}, M.h("button.link", { onclick: actions.close }, "Model"), M.h("span", {}, "›"), M.h("b", {}, block.label), M.status(block.status),
    fold ? M.h("span.stepper", {}, step("‹", "Previous layer", layer > 0, () => actions.open(block.index - fold.period)), `layer ${layer + 1} of ${fold.count}`,
      step("›", "Next layer", layer + 1 < fold.count, () => actions.open(block.index + fold.period))) : null,
    pages > 1 ? M.h("span.stepper", {}, step("‹", "Earlier nodes", state.page > 0, () => actions.leaf(state.page - 1)),
      `nodes ${state.page * MOST_NODES + 1} to ${Math.min(all.length, (state.page + 1) * MOST_NODES)} of ${all.length}`,
      step("›", "Later nodes", state.page + 1 < pages, () => actions.leaf(state.page + 1))) : M.h("span.stepper", {}, M.count(all.length, "node")));
}
