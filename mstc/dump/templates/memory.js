"use strict";
// Live bytes over the step by category: as written, and rewritten, on one scale.
const KINDS = ["parameters", "gradients", "saved", "temporary"];
const KIND_WORDS = { parameters: "parameters and inputs", gradients: "gradients of parameters", saved: "saved for the backward", temporary: "temporary" };

M.memoryTab = (app) => {
  const g = app.graph;
  if (!g.before.steps.length) return { root: M.h("section.page", { role: "tabpanel" }, M.h("p.empty", {}, "No memory was predicted for this graph: it was left as it came, or not recorded.")) };
  const most = Math.max(M.peak(g.before), M.peak(g.after));
  const plots = M.h("div.halves.both", {}, plot("As written, eager", g.before, most), plot("Rewritten", g.after, most));
  const keys = M.h("div.legend", {}, KINDS.map((k) => M.h("span", {}, M.h("i", { class: `area ${k}` }), KIND_WORDS[k])));
  return { root: M.h("section.page.wide", { role: "tabpanel" }, M.h("h2", {}, "Memory over one step"), keys, plots, table(g), measured(app.dump.measured),
    M.h("p.muted", {}, "Predicted by how long each value lives and what loops and attention need besides; the allocator's own losses are left out. Rewritten: as compiled, where cheap values are made again in the backward rather than kept.")) };
};

function plot(title, memory, most) {
  const [w, h, left, bottom, top] = [640, 300, 64, 26, 14];
  const n = memory.steps.length;
  const x = d3.scaleLinear([0, n], [left, w - 8]);
  const y = d3.scaleLinear([0, most * 1.04], [h - bottom, top]);
  const svg = d3.create("svg").attr("viewBox", `0 0 ${w} ${h}`).attr("class", "plot").attr("role", "img").attr("aria-label", `${title}: peak ${M.bytes(M.peak(memory))}`);
  let floor = new Array(n).fill(0);
  for (const k of KINDS) {
    const low = floor;
    floor = low.map((v, i) => v + memory[k][i]);
    const high = floor;
    const steps = d3.range(n + 1).map((i) => Math.min(i, n - 1));
    svg.append("path").attr("class", `area ${k}`).attr("d", d3.area((_, i) => x(i), (i) => y(low[i]), (i) => y(high[i])).curve(d3.curveStepAfter)(steps));
  }
  const ticks = svg.append("g").attr("class", "axis");
  for (const v of binaryTicks(most)) {
    ticks.append("line").attr("x1", left).attr("x2", w - 8).attr("y1", y(v)).attr("y2", y(v));
    ticks.append("text").attr("x", left - 6).attr("y", y(v) + 4).attr("text-anchor", "end").text(M.bytes(v));
  }
  if (memory.backward < n) {
    svg.append("line").attr("class", "divide").attr("x1", x(memory.backward)).attr("x2", x(memory.backward)).attr("y1", top).attr("y2", h - bottom);
    for (const [word, from, to] of [["forward", 0, memory.backward], ["backward", memory.backward, n]]) svg.append("text").attr("class", "phase").attr("x", x((from + to) / 2)).attr("y", h - 8).attr("text-anchor", "middle").text(word);
  }
  const total = M.total(memory);
  const at = total.indexOf(M.peak(memory));
  svg.append("circle").attr("class", "peak").attr("cx", x(at + 0.5)).attr("cy", y(total[at])).attr("r", 3.5);
  svg.append("text").attr("class", "peak").attr("x", Math.min(Math.max(x(at), left + 50), w - 60)).attr("y", Math.max(y(total[at]) - 7, 11)).attr("text-anchor", "middle").text(M.bytes(total[at]));
  const tip = M.h("div.tip", { hidden: true });
  const cursor = svg.append("line").attr("class", "cursor").attr("y1", top).attr("y2", h - bottom).attr("visibility", "hidden");
  svg.on("pointermove", (e) => {
    const i = Math.max(0, Math.min(n - 1, Math.floor(x.invert(d3.pointer(e)[0]))));
    cursor.attr("x1", x(i + 0.5)).attr("x2", x(i + 0.5)).attr("visibility", "visible");
    tip.hidden = false;
    M.clear(tip, M.h("b.mono", {}, memory.steps[i]), M.h("span", {}, `${i < memory.backward ? "forward" : "backward"}: ${M.bytes(total[i])}`),
      KINDS.map((k) => M.h("span", {}, M.h("i", { class: `area ${k}` }), `${k} ${M.bytes(memory[k][i])}`)));
  }).on("pointerleave", () => { tip.hidden = true; cursor.attr("visibility", "hidden"); });
  return M.h("figure.half", {}, M.h("figcaption", {}, M.h("b", {}, title), ` peak ${M.bytes(M.peak(memory))}`), svg.node(), tip);
}

// Steps that ran: bytes above rest over time, one line for each system.
function measured(steps) {
  if (!steps.length) return M.h("p.muted", {}, "Nothing was run: ", M.h("code", {}, "mstc dump --measure"), " runs a step of eager and of mstc and draws its memory here.");
  const [w, h, left, bottom, top] = [1300, 300, 64, 26, 14];
  const most = d3.max(steps, (m) => Math.max(m.peak, d3.max(m.samples, (s) => s[1]) || 0)) || 1;
  const longest = d3.max(steps, (m) => d3.max(m.samples, (s) => s[0]) || 0) || 1;
  const x = d3.scaleLinear([0, longest], [left, w - 8]);
  const y = d3.scaleLinear([0, most * 1.04], [h - bottom, top]);
  const svg = d3.create("svg").attr("viewBox", `0 0 ${w} ${h}`).attr("class", "plot").attr("role", "img").attr("aria-label", `Measured: ${steps.map((m) => `${m.system} ${M.bytes(m.peak)}`).join(", ")}`);
  const ticks = svg.append("g").attr("class", "axis");
  for (const v of binaryTicks(most)) {
    ticks.append("line").attr("x1", left).attr("x2", w - 8).attr("y1", y(v)).attr("y2", y(v));
    ticks.append("text").attr("x", left - 6).attr("y", y(v) + 4).attr("text-anchor", "end").text(M.bytes(v));
  }
  for (const s of x.ticks(8)) ticks.append("text").attr("x", x(s)).attr("y", h - 8).attr("text-anchor", "middle").text(`${s} s`);
  for (const m of steps) svg.append("path").attr("class", `line ${m.system}`).attr("d", d3.line((s) => x(s[0]), (s) => y(Math.max(s[1], 0)))(m.samples));
  const keys = M.h("div.legend", {}, steps.map((m) => M.h("span", {}, M.h("i", { class: `line ${m.system}` }), `${m.system}, ${m.device}: peak ${M.bytes(m.peak)} above rest`)));
  return M.h("div.measured", {}, M.h("h3", {}, "Measured"), keys, M.h("figure", {}, svg.node()));
}

function binaryTicks(most) {
  const step = 2 ** Math.floor(Math.log2(most / 3 || 1));
  return d3.range(0, most * 1.02, step);
}

function table(g) {
  const at = (m) => { const total = M.total(m); return total.indexOf(Math.max(...total)); };
  const [i, j] = [at(g.before), at(g.after)];
  const row = (name, a, b) => M.h("tr", {}, M.h("th", {}, name), M.h("td", {}, M.bytes(a)), M.h("td", {}, M.bytes(b)));
  return M.h("table", {}, M.h("thead", {}, M.h("tr", {}, M.h("th", {}, "at the peak"), M.h("th", {}, "as written"), M.h("th", {}, "rewritten"))),
    M.h("tbody", {}, KINDS.map((k) => row(KIND_WORDS[k], g.before[k][i], g.after[k][j])), row("together", M.peak(g.before), M.peak(g.after))));
}
