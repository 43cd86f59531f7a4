// The list of sessions, the latest first: rows are made as they come into view.

import { byId, h } from "./dom.js";
import { Timeline } from "./timeline.js";
import { ago, cause, clock, count, organisation, percent, plural, sessionName, tier } from "./words.js";

const BATCH = 30;
const DRAWING_MS = 6;  // of a frame, at most: the rest is the browser's, to lay out what was drawn
const HELD_S = 4;  // how long rows keep their places once the pointer has moved over them

export class Sessions {
  #rows = new Map();  // by session's key
  #rowOf = new WeakMap();  // by element
  #waiting = new Set();  // rows that have come into view, and are not drawn yet
  #frame = 0;
  #order = [];
  #made = BATCH;  // how many rows there may be
  #room = { width: 0 };
  #pointed = -Infinity;
  #search = "";
  #onlyBreaks = false;

  constructor(requests, on) {
    this.requests = requests;
    this.on = on;
    this.now = Date.now() / 1000;
    this.list = byId("list");
    this.tip = h("div", { class: "tip", "aria-hidden": "true", hidden: true });
    document.body.append(this.tip);
    this.watcher = new IntersectionObserver((entries) => this.#watched(entries), { rootMargin: "400px" });
    const end = new IntersectionObserver((entries) => {
      if (entries.some((entry) => entry.isIntersecting)) this.#grow();
    }, { rootMargin: "800px" });
    end.observe(byId("end"));
    this.list.addEventListener("pointermove", () => { this.#pointed = performance.now(); });
    byId("search").addEventListener("input", (event) => {
      this.#search = event.target.value.trim().toLowerCase();
      this.#arrange();
    });
    byId("only-breaks").addEventListener("change", (event) => {
      this.#onlyBreaks = event.target.checked;
      this.#arrange();
    });
    new ResizeObserver(() => this.#measure()).observe(this.list);
  }

  // Keep the places of what is on its way.
  await() {
    const skeleton = () => h("div", { class: "session card skeleton" });
    this.list.replaceChildren(...Array.from({ length: 4 }, skeleton));
    byId("state").replaceChildren(h("p", { class: "unseen" }, "Loading…"));
  }

  showBreaks() {
    byId("only-breaks").checked = this.#onlyBreaks = true;
    this.#arrange();
    byId("sessions").focus();
  }

  // Show what has changed since the last time.
  update(changed, now) {
    this.now = now;
    for (const key of changed) this.#rows.get(key)?.refresh(now);
    const held = performance.now() - this.#pointed < HELD_S * 1000
      || this.list.contains(document.activeElement);
    if (!held || !this.#order.length) this.#arrange();
    else this.#count();
  }

  // Let the times that are told grow older.
  age(now) {
    this.now = now;
    for (const row of this.#rows.values()) row.age(now);
  }

  clear() {
    this.list.replaceChildren();
    for (const row of this.#rows.values()) this.watcher.unobserve(row.element);
    this.#rows.clear();
    this.#waiting.clear();
    this.#order = [];
    this.#made = BATCH;
    this.#unpoint();
  }

  // All timelines are as wide as the first one. Rows that come change the list's height only.
  #measure() {
    const box = this.list.querySelector(".scroller");
    if (!box || box.clientWidth === this.#room.width) return;
    this.#room.width = box.clientWidth;
    for (const row of this.#rows.values()) row.timeline.resize();
  }

  #wanted(session) {
    if (this.#onlyBreaks && !session.breaks) return false;
    if (!this.#search) return true;
    const names = `${sessionName(session.name)}\n${session.org}`.toLowerCase();
    return names.includes(this.#search);
  }

  #arrange() {
    const all = [...this.requests.sessions.values()].filter((session) => this.#wanted(session));
    this.#order = all.sort((a, b) => b.latest - a.latest || (a.key < b.key ? -1 : 1));
    this.#place();
    this.#count();
  }

  #count() {
    const { sessions, count: loaded } = this.requests;
    const shown = this.#order.length;
    const some = shown === sessions.size ? "" : `${count(shown)} of `;
    byId("counted").textContent = `${some}${plural(sessions.size, "session")}, ${plural(loaded, "request")}`;
    byId("state").replaceChildren(...this.#nothing(sessions.size, shown));
  }

  #nothing(known, shown) {
    if (shown) return [];
    if (known) return [h("p", null, "No session matches. "), h("button", {
      type: "button", class: "quiet", onclick: () => this.#all() }, "Show all sessions")];
    return [
      h("p", { class: "large" }, "No requests yet"),
      h("p", null, "They appear here once they are answered. Point a client at this server: ",
        h("code", null, `ANTHROPIC_BASE_URL=${location.origin}`)),
    ];
  }

  #all() {
    byId("search").value = this.#search = "";
    byId("only-breaks").checked = this.#onlyBreaks = false;
    this.#arrange();
  }

  #grow() {
    if (this.#made >= this.#order.length) return;
    this.#made += BATCH;
    this.#place();
  }

  #place() {
    const wanted = new Set();
    let after = null;
    for (const session of this.#order.slice(0, this.#made)) {
      let row = this.#rows.get(session.key);
      if (!row) {
        row = new Row(session, this.requests.tiers, this.#room, this.now, this.#events());
        this.#rows.set(session.key, row);
        this.#rowOf.set(row.element, row);
        this.watcher.observe(row.element);
      }
      wanted.add(session.key);
      const expected = after ? after.nextSibling : this.list.firstChild;
      if (expected !== row.element) this.list.insertBefore(row.element, expected);
      after = row.element;
    }
    // What only kept a place.
    while (this.list.childElementCount > wanted.size && this.list.lastChild !== after) {
      if (!this.list.lastChild.matches(".skeleton")) break;
      this.list.lastChild.remove();
    }
    for (const [key, row] of this.#rows) {
      if (wanted.has(key)) continue;
      this.watcher.unobserve(row.element);
      row.element.remove();
      this.#rows.delete(key);
      this.#waiting.delete(row);
    }
    this.#measure();
  }

  #events() {
    return {
      open: (request, timeline) => {
        this.#unpoint();
        this.on.open(request, timeline);
      },
      move: this.on.move,
      point: (request, event) => this.#point(request, event),
      unpoint: () => this.#unpoint(),
    };
  }

  #watched(entries) {
    for (const { target, isIntersecting } of entries) {
      const row = this.#rowOf.get(target);
      row.timeline.inView = isIntersecting;
      if (isIntersecting) this.#waiting.add(row);
      else {
        this.#waiting.delete(row);
        row.timeline.leave();
      }
    }
    this.#drawWaiting();
  }

  // Many rows come into view at once when the list has grown. What takes longer is left to the next
  // frame, so that scrolling goes on.
  #drawWaiting() {
    const began = performance.now();
    for (const row of this.#waiting) {
      this.#waiting.delete(row);
      row.timeline.draw();
      if (performance.now() - began > DRAWING_MS) break;
    }
    if (!this.#waiting.size || this.#frame) return;
    this.#frame = requestAnimationFrame(() => {
      this.#frame = 0;
      this.#drawWaiting();
    });
  }

  #point(request, event) {
    if (event.pointerType === "touch") return;
    const lines = [
      h("b", null, clock(request.at)),
      h("span", null, `${count(request.prompt)} tokens, ${percent(request.readTokens, request.prompt)} read`),
    ];
    for (const [name, tokens] of Object.entries(request.read)) {
      if (tokens) lines.push(h("span", null, `${count(tokens)} from ${tier(name)}`));
    }
    lines.push(h("span", null, `${count(request.createdTokens)} created, ${count(request.uncached)} uncached`));
    if (request.isBreak) {
      lines.push(h("span", { class: request.expected ? "kind expected" : "kind" },
        `${cause(request.cause)}: ${count(request.missed)} tokens missed`));
    }
    this.tip.replaceChildren(...lines);
    this.tip.hidden = false;
    const { offsetWidth, offsetHeight } = this.tip;
    const x = Math.min(event.clientX + 14, innerWidth - offsetWidth - 8);
    const y = event.clientY + 18 + offsetHeight > innerHeight ? event.clientY - offsetHeight - 10 : event.clientY + 18;
    this.tip.style.transform = `translate(${x}px, ${y}px)`;
  }

  #unpoint() {
    this.tip.hidden = true;
  }
}

class Row {
  constructor(session, tiers, room, now, events) {
    this.session = session;
    this.timeline = new Timeline(session, tiers, room, events);
    this.facts = h("p", { class: "facts" });
    const name = sessionName(session.name);
    const isNamed = session.name !== null;
    this.element = h("article", { class: "session card", "aria-label": `Session ${name}` },
      h("header", null,
        h("h3", { class: isNamed ? "name" : "name unnamed", title: name }, h("bdi", null, name)),
        h("span", { class: "org", title: session.org }, h("bdi", null, organisation(session.org))),
        this.facts),
      this.timeline.element);
    this.refresh(now);
  }

  refresh(now) {
    const { session } = this;
    this.when = h("span", { class: "when" });
    const facts = [
      h("span", { class: "rate" }, h("b", null, percent(session.read, session.prompt)), " read"),
      h("span", null, plural(session.requests.length, "request")),
    ];
    if (session.lanes.size > 1) facts.push(h("span", null, plural(session.lanes.size, "lineage")));
    if (session.breaks) {
      facts.push(h("span", { class: "badge" }, plural(session.breaks, "break")));
    }
    if (session.expectedBreaks) {
      facts.push(h("span", { class: "badge expected" }, plural(session.expectedBreaks, "expected break")));
    }
    this.facts.replaceChildren(...facts, this.when);
    this.age(now);
    this.timeline.draw();
  }

  age(now) {
    this.when.textContent = ago(now - this.session.latest);
  }
}
