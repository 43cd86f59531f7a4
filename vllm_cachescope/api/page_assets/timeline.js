// The timeline of one session: a column for each request in order, a lane for each lineage.
//
// Only the columns in view are in the document, however long the session is.

import { h, s } from "./dom.js";
import { clock, day, plural, roughly, sentence, short } from "./words.js";

const FEW_LANES = 6;
const PAUSE_S = 60;  // from here on a pause is worth a mark
const HEAD = 14;  // above the lanes, for pauses
const AXIS = 18;  // below them, for the time
const MARK = 9;  // above a lane's bars, for the mark of a break
const LABEL = 78;  // room that a time takes
const SPARE = 6;  // columns drawn beside those in view

const TALLEST = 58;  // the session's longest prompt
const LOWEST = 12;  // a lane has room for so much at least

// How far apart requests are: closer, down to what can still be pointed at, where there are many.
const coarse = matchMedia("(pointer: coarse)");
const pitchFor = (requests, room) => {
  const [least, most] = coarse.matches ? [20, 30] : [12, 28];
  return Math.max(least, Math.min(most, Math.floor((room - 8) / Math.max(requests, 1))));
};

// The segments of a request from the bottom up: [class, tokens].
export const segments = (request, tiers) => [
  ...tiers.map((tier, index) => [`t${Math.min(index, 4)}`, request.read[tier] ?? 0]),
  ["created", request.createdTokens],
  ["uncached", request.uncached],
];

export class Timeline {
  #pitch = pitchFor(Infinity, 0);
  #drawn = new Map();  // groups by index
  #seen = -1;  // the session's version that is drawn
  #frame = 0;
  #left = 0;  // how far it is scrolled: asking for that makes the browser lay the page out
  #all = false;  // whether all lanes are shown

  // `room` says how wide timelines are shown by now, in pixels.
  constructor(session, tiers, room, on) {
    this.session = session;
    this.tiers = tiers;
    this.room = room;
    this.on = on;
    this.active = null;  // the request that the keyboard is at
    this.inView = false;
    this.lanes = s("g", { role: "none" });
    this.bars = s("g", { role: "none" });
    this.axis = s("g", { class: "axis", "aria-hidden": "true" });
    this.svg = s("svg", { role: "none", focusable: "false" }, this.lanes, this.axis, this.bars);
    this.box = h("div", {
      class: "scroller", role: "listbox", "aria-orientation": "horizontal",
      onscroll: () => {
        this.#left = this.box.scrollLeft;
        this.#later();
      },
      onkeydown: (event) => this.#key(event),
      onclick: (event) => this.#pointed(event, (request) => this.open(request)),
      onpointermove: (event) => this.#pointed(event, (request) => on.point(request, event), on.unpoint),
      onpointerleave: on.unpoint,
      onfocusin: (event) => this.#focused(event),
    }, this.svg);
    this.gutter = s("svg", { class: "gutter", width: 46, "aria-hidden": "true" });
    this.more = h("button", { type: "button", class: "quiet more", hidden: true,
      onclick: () => { this.#all = !this.#all; this.#seen = -1; this.draw(); } });
    this.element = h("div", { class: "timeline" }, this.gutter, this.box, this.more);
    this.#size();
  }

  // Draw what is in view, as the session is by now.
  draw() {
    if (!this.inView) {
      this.#size();
      return;
    }
    const atEnd = this.#left + this.room.width >= this.width - 2 * this.#pitch;
    if (this.#seen !== this.session.changed) {
      const hadFocus = this.box.contains(document.activeElement);
      this.#clear();
      this.#size();
      this.#frameLanes();
      if (this.#seen === -1 || atEnd) this.#scroll(this.width);
      this.#seen = this.session.changed;
      this.#fill();
      if (hadFocus && this.active) this.focus(this.active);
      return;
    }
    this.#fill();
  }

  // Take everything out of the document; its room stays.
  leave() {
    if (this.box.contains(document.activeElement)) return;
    this.#clear();
    this.#seen = -1;
  }

  resize() {
    this.#seen = -1;
    this.draw();
  }

  focus(request) {
    this.active = request;
    this.#reveal(request);
    this.#fill();
    this.#drawn.get(request.index)?.focus({ preventScroll: true });
  }

  // Scroll a request into view.
  show(request) {
    this.active = request;
    this.#reveal(request);
    this.#fill();
  }

  // Mark the request whose details are shown; null for none.
  select(request) {
    this.selected = request;
    for (const [index, group] of this.#drawn) {
      group.setAttribute("aria-selected", String(this.session.requests[index] === request));
    }
  }

  open(request) {
    this.active = request;
    this.focus(request);
    this.on.open(request, this);
  }

  // The requests beside one: `step` further, or the next break that way.
  beside(request, step, breaksOnly = false) {
    const { requests } = this.session;
    let index = request.index + step;
    while (breaksOnly && requests[index] && !requests[index].isBreak) index += step;
    return requests[index] ?? null;
  }

  #shownLanes() {
    const lanes = this.session.lanes.size;
    return this.#all || lanes <= FEW_LANES ? lanes : FEW_LANES;
  }

  // Where the lane of a request is drawn: lanes beyond those shown share the last one.
  #row(request) {
    return Math.min(request.lane, this.#shownLanes() - 1);
  }

  #size() {
    const { requests, lanes } = this.session;
    const rows = this.#shownLanes();
    // Each lane is as high as its longest prompt needs, all on one scale.
    const tallest = new Array(rows).fill(0);
    for (const request of requests) {
      const row = this.#row(request);
      tallest[row] = Math.max(tallest[row], request.prompt);
    }
    this.scale = TALLEST / this.session.tallest;
    let base = HEAD;
    this.heights = tallest.map((tokens) => Math.max(LOWEST, Math.ceil(tokens * this.scale)) + MARK);
    this.bases = this.heights.map((height) => (base += height));
    this.bottom = base;
    this.#pitch = pitchFor(requests.length, this.room.width);
    this.width = requests.length * this.#pitch + 8;
    this.svg.setAttribute("width", this.width);
    this.svg.setAttribute("height", this.bottom + AXIS);
    this.gutter.setAttribute("height", this.bottom + AXIS);
    const hidden = lanes.size - FEW_LANES;
    this.more.hidden = hidden <= 0;
    this.more.textContent = this.#all ? "Fewer lineages" : `${plural(hidden + 1, "lineage")} in the last lane: show each`;
    this.box.setAttribute("aria-label",
      `${plural(requests.length, "request")}; arrow keys move, B goes to the next break, Enter opens`);
  }

  #frameLanes() {
    const names = [...this.session.lanes.keys()];
    const rows = this.bases.length;
    this.gutter.replaceChildren();
    this.lanes.replaceChildren();
    this.bases.forEach((base, row) => {
      this.lanes.append(s("line", { class: "base", x1: 0, x2: "100%", y1: base + 0.5, y2: base + 0.5 }));
      const isRest = row === rows - 1 && names.length > rows;
      const name = rows === 1 ? "0" : isRest ? "rest" : names[row] === null ? "–" : `#${names[row]}`;
      this.gutter.append(s("text", { x: 40, y: base - 1, class: rows === 1 ? "scale" : "lane" }, name));
    });
    const highest = this.bases[this.heights.indexOf(Math.max(...this.heights))] - TALLEST;
    this.gutter.append(s("text", { x: 40, y: highest + 7, class: "scale" }, short(this.session.tallest)));
  }

  #fill() {
    const { requests } = this.session;
    const from = Math.max(0, Math.floor(this.#left / this.#pitch) - SPARE);
    const shown = Math.ceil(this.room.width / this.#pitch) + 2 * SPARE;
    const to = Math.min(requests.length, from + shown);
    for (const [index, group] of this.#drawn) {
      if (index >= from && index < to) continue;
      if (group === document.activeElement) continue;
      group.remove();
      this.#drawn.delete(index);
    }
    const fresh = document.createDocumentFragment();
    for (let index = from; index < to; index += 1) {
      if (this.#drawn.has(index)) continue;
      const group = this.#bar(requests[index]);
      this.#drawn.set(index, group);
      fresh.append(group);
    }
    this.bars.append(fresh);
    this.#times(from, to);
    this.#tabStop();
  }

  #times(from, to) {
    const { requests } = this.session;
    const every = Math.ceil(LABEL / this.#pitch);
    const base = this.bottom;
    const marks = [];
    let labelled = -Infinity;
    for (let index = from; index < to; index += 1) {
      const [request, before] = [requests[index], requests[index - 1]];
      const x = index * this.#pitch;
      if (index % every === 0) {
        const newDay = index === 0 || day(requests[Math.max(0, index - every)].at) !== day(request.at);
        const isToday = day(Date.now() / 1000) === day(request.at);
        const text = newDay && !isToday ? `${day(request.at)} ${clock(request.at).slice(0, 5)}` : clock(request.at);
        marks.push(s("line", { class: "tick", x1: x + 3.5, x2: x + 3.5, y1: base, y2: base + 4 }));
        marks.push(s("text", { x: x + 1, y: base + 14 }, text));
      }
      const pause = before ? request.at - before.at : 0;
      if (pause < PAUSE_S) continue;
      marks.push(s("line", { class: "pause", x1: x - 0.5, x2: x - 0.5, y1: HEAD - 2, y2: base }));
      if (x - labelled < 50) continue;
      labelled = x;
      marks.push(s("text", { class: "pause", x: x - 2, y: HEAD - 4 }, `+${roughly(pause)}`));
    }
    this.axis.replaceChildren(...marks);
  }

  #bar(request) {
    const x = request.index * this.#pitch + 2;
    const width = this.#pitch - 3;
    const row = this.#row(request);
    const [bottom, room, { scale }] = [this.bases[row], this.heights[row], this];
    const kind = request.isBreak ? (request.expected ? " expected" : " break") : "";
    const { requests } = this.session;
    const group = s("g", {
      class: `request${kind}`, role: "option", tabindex: -1, "data-index": request.index,
      "aria-selected": String(this.selected === request),
      "aria-setsize": requests.length, "aria-posinset": request.index + 1,
      "aria-label": sentence(request, `Request ${request.index + 1} of ${requests.length}`),
    });
    group.append(s("rect", { class: "ground", x: x - 1.5, y: bottom - room, width: this.#pitch, height: room }));
    let top = bottom;
    for (const [name, tokens] of segments(request, this.tiers)) {
      if (!tokens) continue;
      const height = Math.max(tokens * scale, 0.75);
      top -= height;
      group.append(s("rect", { class: name, x, y: top, width, height }));
    }
    if (request.isBreak) {
      // What could have been read lies directly on what was.
      const lost = Math.min(request.missed, request.prompt - request.readTokens) * scale;
      const ceiling = bottom - request.readTokens * scale;
      if (lost > 0.5) {
        group.append(s("rect", { class: request.expected ? "lost expected" : "lost", x, y: ceiling - lost, width, height: lost }));
      }
      const [left, middle, right, tip] = [x - 0.5, x + width / 2, x + width + 0.5, top - 1];
      group.append(s("path", { class: "mark", d: `M${left} ${tip - 6.5}H${right}L${middle} ${tip}Z` }));
    }
    return group;
  }

  #clear() {
    for (const group of this.#drawn.values()) group.remove();
    this.#drawn.clear();
    this.axis.replaceChildren();
  }

  #later() {
    this.on.unpoint();
    if (this.#frame) return;
    this.#frame = requestAnimationFrame(() => {
      this.#frame = 0;
      if (this.inView) this.#fill();
    });
  }

  // One of the requests can be reached with Tab: the active one, or the newest.
  #tabStop() {
    const { requests } = this.session;
    const wanted = (this.active ?? requests.at(-1)).index;
    const stop = this.#drawn.has(wanted) ? wanted : Math.max(...this.#drawn.keys());
    for (const [index, group] of this.#drawn) group.setAttribute("tabindex", index === stop ? 0 : -1);
  }

  #reveal(request) {
    const [x, shown] = [request.index * this.#pitch, this.room.width];
    if (x < this.#left + this.#pitch) this.#scroll(x - shown / 3);
    else if (x + 2 * this.#pitch > this.#left + shown) this.#scroll(x - (2 * shown) / 3);
  }

  #scroll(to) {
    const left = Math.max(0, Math.min(to, this.width - this.room.width));
    if (left === this.#left) return;
    this.box.scrollLeft = this.#left = left;
  }

  #of(event) {
    const group = event.target.closest?.(".request");
    return group ? this.session.requests[Number(group.dataset.index)] : null;
  }

  #pointed(event, act, otherwise = () => {}) {
    const request = this.#of(event);
    if (request) act(request);
    else otherwise();
  }

  #focused(event) {
    const request = this.#of(event);
    if (!request || request === this.active) return;
    this.active = request;
    this.#tabStop();
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const at = this.active ?? this.session.requests.at(-1);
    const next = this.target(event, at);
    if (next === undefined) return;
    event.preventDefault();
    if (event.key === "Enter" || event.key === " ") this.open(at);
    else if (next) {
      this.focus(next);
      this.on.move(next, this);
    }
  }

  // Where a key leads from a request: undefined if it is none of ours, null for nowhere.
  target({ key, shiftKey }, at) {
    const { requests } = this.session;
    switch (key) {
      case "ArrowLeft": return this.beside(at, -1);
      case "ArrowRight": return this.beside(at, 1);
      case "ArrowUp": case "ArrowDown": return this.#lane(at, key === "ArrowUp" ? -1 : 1);
      case "Home": return requests[0];
      case "End": return requests.at(-1);
      case "b": case "B": return this.beside(at, shiftKey ? -1 : 1, true);
      case "Enter": case " ": return at;
      default: return undefined;
    }
  }

  // The request nearest to another one in the lane above or below.
  #lane(at, step) {
    const { requests } = this.session;
    for (let away = 1; away < requests.length; away += 1) {
      for (const other of [requests[at.index - away], requests[at.index + away]]) {
        if (other && other.lane === at.lane + step) return other;
      }
    }
    return null;
  }
}
