// A heat map of a lineage: how long each stretch of its prompt has been the same, call by call.

import { h } from "./dom.js";
import { count, plural } from "./words.js";

const ROWS = 48;
const CELL = 9;
const MOST = 1200;  // calls in one map
const LANES = 4;

// Blue where it is stable, grey where it is new, red where it was stable and changed.
const colours = () => {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(["t0", "uncached", "break"].map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
};

// For each call, rows of how many calls in a row had the prompt the same up to there; null past
// its end, -1 where a longer stretch had been shared and was lost.
const ages = (requests, tallest) => {
  let before = new Array(ROWS).fill(0);
  return requests.map((request) => {
    const rows = before.map((age, row) => {
      const end = ((row + 1) * tallest) / ROWS;
      const start = (row * tallest) / ROWS;
      if (start >= request.prompt) return null;
      if (end <= request.shared || (request.shared > start && request.shared >= request.prompt)) return age + 1;
      // What expired had not changed.
      const changed = request.isBreak && request.region !== "cache";
      return changed && start < request.shared + request.missed ? -1 : 0;
    });
    before = rows.map((age) => Math.max(0, age ?? 0));
    return rows;
  });
};

const draw = (requests, tallest) => {
  const shown = requests.slice(0, MOST);
  const canvas = h("canvas", { width: shown.length * CELL, height: ROWS * 3, role: "img",
    "aria-label": `${plural(shown.length, "call")}, at most ${count(tallest)} tokens each` });
  const paint = canvas.getContext("2d");
  const colour = colours();
  ages(shown, tallest).forEach((rows, column) => rows.forEach((age, row) => {
    if (age === null) return;
    paint.globalAlpha = age > 0 ? Math.min(1, 0.35 + Math.log2(1 + age) / 8) : 1;
    paint.fillStyle = age < 0 ? colour.break : age === 0 ? colour.uncached : colour.t0;
    paint.fillRect(column * CELL, row * 3, CELL - 1, 3);
  }));
  return canvas;
};

// The maps of a session's longest lineages.
export const heat = (session) => {
  const lanes = new Map();
  for (const request of session.requests) {
    if (!lanes.has(request.lineage)) lanes.set(request.lineage, []);
    lanes.get(request.lineage).push(request);
  }
  const longest = [...lanes].sort((a, b) => b[1].length - a[1].length).slice(0, LANES);
  return longest.flatMap(([lineage, requests]) => {
    const tallest = Math.max(1, ...requests.map(({ prompt }) => prompt));
    return [h("h3", null, `Lineage #${lineage}, ${plural(requests.length, "call")}, up to ${count(tallest)} tokens`), draw(requests, tallest)];
  });
};
