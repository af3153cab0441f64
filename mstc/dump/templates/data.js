"use strict";
// The data as the page uses them: nodes as objects, the stages' orders resolved, indices by name.
M.read = () => {
  const dump = JSON.parse(document.getElementById("mstc-data").textContent);
  dump.graphs.forEach(readGraph);
  return dump;
};

function readGraph(g) {
  const shared = new Set(g.shared);
  const rows = g.nodes.map((row) => {
    const node = {};
    g.columns.forEach((name, i) => { node[name] = shared.has(name) ? g.texts[row[i]] : row[i]; });
    return node;
  });
  let before = null;
  for (const stage of g.stages) {
    stage.nodes = stage.order === null ? before : stage.order.map((i) => rows[i]);
    stage.changed = stage.order !== null;
    before = stage.nodes;
  }
  g.first = g.stages.length ? g.stages[0].nodes : [];
  g.last = g.stages.length ? before : [];
  g.byName = new Map();
  for (const stage of g.stages) for (const n of stage.nodes) if (!g.byName.has(n.name)) g.byName.set(n.name, n);
  g.users = new Map();
  for (const n of rows) for (const i of n.inputs) {
    if (!g.users.has(i)) g.users.set(i, new Set());
    g.users.get(i).add(n.name);
  }
  g.blockOf = new Map();
  g.blocks.forEach((b, i) => {
    b.index = i;
    for (const name of [...b.inside, ...b.nodes]) if (!g.blockOf.has(name)) g.blockOf.set(name, i);
  });
  g.foldAt = (i) => g.folds.find((f) => i >= f.start && i < f.start + f.period * f.count);
  g.refusedBy = M.group(g.refusals, (r) => r.node);
}

// The nodes of a block as it was written, where a loop stands for them, else as they are.
M.blockNodes = (g, block) => (block.inside.length ? block.inside : block.nodes).map((n) => g.byName.get(n)).filter(Boolean);

// The refusals that concern a block.
M.blockRefusals = (g, block) => [...new Set([...block.inside, ...block.nodes].flatMap((n) => g.refusedBy.get(n) || []))];

M.total = (memory) => memory.steps.map((_, i) => memory.parameters[i] + memory.gradients[i] + memory.saved[i] + memory.temporary[i]);
M.peak = (memory) => M.total(memory).reduce((a, b) => Math.max(a, b), 0);
