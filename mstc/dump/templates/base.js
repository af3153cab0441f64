"use strict";
// Small helpers. Text only ever enters the page as textContent, never as HTML.
const M = {};

// h("div.card#id", {onclick: ..., title: ...}, child, "text", ...)
M.h = (what, props, ...children) => {
  const [, tag, rest] = /^(\w+)(.*)$/.exec(what);
  const e = document.createElement(tag);
  for (const part of rest.match(/[.#][\w-]+/g) || []) {
    if (part[0] === ".") e.classList.add(part.slice(1));
    else e.id = part.slice(1);
  }
  for (const [k, v] of Object.entries(props || {})) {
    if (v === undefined || v === null || v === false) continue;
    if (k.startsWith("on")) e.addEventListener(k.slice(2), v);
    else if (k === "style") Object.assign(e.style, v);
    else if (k === "class") v.split(" ").filter(Boolean).forEach((c) => e.classList.add(c));
    else e.setAttribute(k, v === true ? "" : v);
  }
  e.append(...children.flat(Infinity).filter((c) => c !== null && c !== undefined && c !== false));
  return e;
};

M.clear = (e, ...children) => { e.replaceChildren(...children.flat(Infinity).filter(Boolean)); return e; };

const scaled = (n, base, units, digits) => {
  let i = 0;
  while (Math.abs(n) >= base && i < units.length - 1) { n /= base; i++; }
  return `${n.toFixed(i === 0 || n >= 100 ? 0 : digits)} ${units[i]}`;
};
M.bytes = (n) => scaled(n, 1024, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"], 1);
M.flops = (n) => scaled(n, 1000, ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"], 1);
M.count = (n, one, many) => `${n.toLocaleString("en-US")} ${n === 1 ? one : many || one + "s"}`;
M.seconds = (s) => (s < 1 ? `${Math.round(s * 1000)} ms` : `${s.toFixed(1)} s`);

// A path that says enough: from site-packages on, or its last three parts.
M.place = (source) => {
  const parts = source.split("/");
  const at = parts.lastIndexOf("site-packages");
  return at >= 0 ? parts.slice(at + 1).join("/") : parts.slice(-3).join("/");
};

M.FIDELITY = { exact: "exact", rounding: "equal up to rounding", approximate: "approximate" };
M.fidelity = (f) => M.h("span.chip", { class: `fidelity ${f}` }, M.FIDELITY[f]);

M.STATUS = {
  chunked: ["chunked", "runs a few tokens at a time, forward and backward"],
  loss: ["head with loss", "runs a few tokens at a time, and its gradients are computed along with the loss"],
  recomputed: ["recomputed", "runs a few tokens at a time, and again in the backward instead of being kept"],
  rewritten: ["rewritten", "a pass changed it"],
  refused: ["refused", "a candidate that was left as it was; see why not"],
  kept: ["as written", "nothing was to be done"],
};
M.status = (s) => M.h("span.chip", { class: `status ${s}`, title: M.STATUS[s][1] }, M.STATUS[s][0]);

M.group = (items, key) => {
  const found = new Map();
  for (const item of items) {
    const k = key(item);
    if (!found.has(k)) found.set(k, []);
    found.get(k).push(item);
  }
  return found;
};
