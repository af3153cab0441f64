"use strict";
// Draws a graph: dagre lays it out, d3 zooms and pans, HTML elements are the nodes.
// items: [{id, width, height, element, parent?}], edges: [{from, to}], clusters: [{id, element}]
M.draw = (items, edges, clusters = [], settings = {}) => {
  const layout = new dagre.graphlib.Graph({ compound: clusters.length > 0 });
  layout.setGraph({ rankdir: "TB", nodesep: 28, ranksep: 34, marginx: 12, marginy: 12,
    ranker: items.length > 120 ? "longest-path" : "network-simplex", ...settings.layout });
  layout.setDefaultEdgeLabel(() => ({}));
  for (const c of clusters) layout.setNode(c.id, {});
  for (const n of items) {
    layout.setNode(n.id, { width: n.width, height: n.height });
    if (n.parent) layout.setParent(n.id, n.parent);
  }
  for (const e of edges) if (e.from !== e.to) layout.setEdge(e.from, e.to);
  dagre.layout(layout);

  const size = layout.graph();
  const lines = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  lines.setAttribute("class", "edges");
  lines.setAttribute("width", size.width);
  lines.setAttribute("height", size.height);
  const curve = d3.line((p) => p.x, (p) => p.y).curve(d3.curveBasis);
  const paths = new Map();
  for (const e of layout.edges()) {
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", curve(layout.edge(e).points));
    lines.append(path);
    for (const end of [e.v, e.w]) paths.set(end, [...(paths.get(end) || []), path]);
  }

  const plane = M.h("div.plane");
  const place = (element, box) => {
    Object.assign(element.style, { left: `${box.x - box.width / 2}px`, top: `${box.y - box.height / 2}px`,
      width: `${box.width}px`, height: `${box.height}px` });
    return element;
  };
  for (const c of clusters) plane.append(place(c.element, layout.node(c.id)));
  plane.append(lines);
  for (const n of items) {
    plane.append(place(n.element, layout.node(n.id)));
    const mark = (on) => () => (paths.get(n.id) || []).forEach((p) => p.classList.toggle("near", on));
    n.element.addEventListener("mouseenter", mark(true));
    n.element.addEventListener("mouseleave", mark(false));
    n.element.addEventListener("focus", mark(true));
    n.element.addEventListener("blur", mark(false));
  }
  return M.canvas(plane, size, new Map(items.map((n) => [n.id, { ...layout.node(n.id), element: n.element }])), settings);
};

// The window onto a plane: wheel and drag, buttons, arrow keys; focus(id) brings a node into view.
M.canvas = (plane, size, places, settings) => {
  const view = M.h("div.canvas", { tabindex: "0", "aria-label": settings.label || "graph" }, plane);
  const zoom = d3.zoom().scaleExtent([0.02, 3]).filter((e) => !e.button && (e.type !== "wheel" || !e.altKey))
    .on("zoom", (e) => { plane.style.transform = `translate(${e.transform.x}px,${e.transform.y}px) scale(${e.transform.k})`; });
  const selection = d3.select(view).call(zoom).on("dblclick.zoom", null);
  const box = () => [view.clientWidth || 800, view.clientHeight || 600];
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const go = (t, soft) => (soft && !still ? selection.transition().duration(250) : selection).call(zoom.transform, t);
  const fit = (soft) => {
    const [w, h] = box();
    const k = Math.min(1, Math.max(Math.min((w - 24) / size.width, (h - 24) / size.height), settings.least || 0.3));
    const tall = size.height * k > h;
    go(d3.zoomIdentity.translate((w - size.width * k) / 2, tall ? 12 : (h - size.height * k) / 2).scale(k), soft);
  };
  const centre = (id) => {
    const at = places.get(id);
    if (!at) return false;
    const [w, h] = box();
    const k = Math.max(d3.zoomTransform(view).k, 0.7);
    go(d3.zoomIdentity.translate(w / 2 - at.x * k, h / 2 - at.y * k).scale(k), true);
    plane.querySelectorAll(".found").forEach((e) => e.classList.remove("found"));
    at.element.classList.add("found");
    at.element.focus({ preventScroll: true });
    return true;
  };
  view.addEventListener("keydown", (e) => {
    const step = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] }[e.key];
    if (step) selection.call(zoom.translateBy, ...step.map((s) => s / d3.zoomTransform(view).k));
    else if (e.key === "+" || e.key === "=") selection.call(zoom.scaleBy, 1.25);
    else if (e.key === "-") selection.call(zoom.scaleBy, 0.8);
    else if (e.key === "0") fit(true);
    else return;
    e.preventDefault();
  });
  // A focused node far outside must not scroll the window under the plane.
  view.addEventListener("scroll", () => { view.scrollTop = view.scrollLeft = 0; });
  const button = (text, title, act) => M.h("button", { title, "aria-label": title, onclick: act }, text);
  view.append(M.h("div.zoom", {},
    button("+", "Zoom in (+)", () => selection.transition().duration(150).call(zoom.scaleBy, 1.3)),
    button("−", "Zoom out (-)", () => selection.transition().duration(150).call(zoom.scaleBy, 0.77)),
    button("⤢", "Fit (0)", () => fit(true))));
  // The first fit waits until the view has a size, and follows it until somebody moved the graph.
  let moved = false;
  zoom.on("start", (e) => { moved = moved || Boolean(e.sourceEvent); });
  new ResizeObserver(() => { if (!moved) fit(false); }).observe(view);
  return { view, fit, centre: (id) => { moved = true; return centre(id); } };
};

// An operator without its namespace; of an input's path the end, which tells it apart.
const opLabel = (node) => (node.kind === "op" ? node.op.replace(/^aten\./, "") : node.title.split(".").slice(-3).join(".") || node.kind);

// One operator as an element; marks: "added", "removed", "changed", "context".
M.opElement = (node, mark, onopen) => {
  const label = opLabel(node);
  return M.h("button.op", { class: `${node.kind} ${mark || ""}`, title: `${node.title || node.name}\n${node.value}`, "data-node": node.name,
    onclick: () => onopen(node) }, M.h("b", {}, label), M.h("small", {}, node.value || node.name));
};

M.opSize = (node) => {
  const label = opLabel(node);
  const wide = Math.max(label.length * 8.2, (node.value || node.name).length * 6.4) + 26;
  return { width: Math.max(84, Math.min(wide, 230)), height: 40 };
};

// Items and edges for a set of nodes, with what they read as context.
M.opGraph = (g, nodes, markOf, onopen, lookup) => {
  const names = new Set(nodes.map((n) => n.name));
  const items = new Map();
  const edges = [];
  const add = (node, mark, id) => { if (!items.has(id)) items.set(id, { id, ...M.opSize(node), element: M.opElement(node, mark, onopen) }); };
  for (const n of nodes) add(n, markOf(n), n.name);
  for (const n of nodes) for (const i of n.inputs) {
    const source = lookup(i);
    if (names.has(i)) edges.push({ from: i, to: n.name });
    else if (source) {
      // A shared parameter stands beside each of its readers: one pill would draw lines across everything.
      const id = source.kind === "op" ? i : `${i} > ${n.name}`;
      add(source, "context", id);
      edges.push({ from: id, to: n.name });
    }
  }
  return { items: [...items.values()], edges };
};
