// The page: who looks, what is loaded, and when it is asked for again.

import { byId, h } from "./dom.js";
import { Details } from "./details.js";
import { Overview } from "./overview.js";
import { Requests } from "./requests.js";
import { Refused, Server } from "./server.js";
import { Sessions } from "./sessions.js";
import { count, organisation, sentence, tier } from "./words.js";

const TRIES = 8;  // to find the API process that has older requests
const EVERY_MS = 2000;
const SLOWEST_MS = 30000;
const DRAWN_MS = 700;  // how often what is loaded is drawn while more is on its way
const AT_FIRST = 10000;  // requests that are loaded without being asked for
const MOST = 60000;  // requests that a tab keeps; older ones go when new ones come

const server = new Server();
let board = null;

class Board {
  constructor() {
    this.requests = new Requests();
    const on = {
      open: (request, timeline) => this.open(request, timeline),
      move: (request, timeline) => this.move(request, timeline),
    };
    this.sessions = new Sessions(this.requests, on);
    this.overview = new Overview(this.requests, () => this.sessions.showBreaks());
    this.details = new Details(server, this.requests.tiers, on);
    this.isPaused = false;
    this.failures = 0;
    this.timer = 0;
    this.run = 0;  // grows with each sign-in, so that answers to an earlier one are left aside
    this.skew = 0;
    byId("pause").addEventListener("click", () => this.pause(!this.isPaused));
    byId("older").addEventListener("click", () => this.older());
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.soon(0);
    });
    document.addEventListener("keydown", (event) => this.key(event));
    setInterval(() => this.tick(), 1000);
  }

  get now() {
    return Date.now() / 1000 + this.skew;
  }

  // Look with the key that the server has by now; `isKnown` says that it did work before.
  start(isKnown) {
    this.run += 1;
    byId("key-form").classList.toggle("busy", !isKnown);
    if (isKnown) {
      byId("board").hidden = false;
      this.sessions.await();
      this.overview.await();
    }
    this.pause(false);
    this.soon(0);
  }

  stop() {
    this.run += 1;
    clearTimeout(this.timer);
    this.details.close({ refocus: false });
    this.requests.clear();
    this.sessions.clear();
    this.overview.draw();
    this.updated = null;
    this.failures = 0;
    byId("older").hidden = true;
    byId("banner").hidden = true;
  }

  soon(ms) {
    clearTimeout(this.timer);
    if (server.hasKey) this.timer = setTimeout(() => this.poll(), ms);
  }

  async poll() {
    if (this.isPaused || document.hidden || this.polling === this.run) return;
    const run = (this.polling = this.run);
    try {
      const isFirst = !this.updated;
      const answer = await server.news();
      if (run !== this.run) return;
      this.failures = 0;
      byId("banner").hidden = true;
      this.take(answer, isFirst);
      this.soon(EVERY_MS);
      // Not waited for: what is new goes on.
      if (server.hasOlder && this.requests.count < AT_FIRST) void this.fillUp(run);
    } catch (error) {
      if (run === this.run) this.failed(error);
    } finally {
      if (this.polling === run) this.polling = null;
      this.tick();
    }
  }

  take(answer, isFirst) {
    this.skew = answer.now - Date.now() / 1000;
    this.updated = answer.now;
    this.currency = answer.currency;
    const changed = this.requests.add(answer.list, answer.requests);
    if (isFirst) {
      showBoard(answer);
    }
    if (this.requests.count > MOST) this.requests.trim(MOST);
    this.draw(changed);
  }

  draw(changed) {
    this.sessions.update(changed, this.now);
    this.overview.draw(this.now, this.currency);
    legend(this.requests.tiers);
    byId("legend").hidden = !this.requests.count;
    byId("older").hidden = !server.hasOlder || this.filling === this.run;
  }

  // Load older requests up to what a tab has at first, an answer at a time.
  async fillUp(run, most = AT_FIRST) {
    if (this.filling === run) return;
    this.filling = run;
    const changed = new Set();
    let [drawn, inVain] = [performance.now(), 0];
    try {
      while (run === this.run && server.hasOlder && this.requests.count < most && inVain < TRIES) {
        const { list, requests } = await server.older(most - this.requests.count);
        if (run !== this.run) return;
        // Of several API processes one may answer that has nothing older.
        inVain = requests.length ? 0 : inVain + 1;
        for (const key of this.requests.add(list, requests)) changed.add(key);
        if (performance.now() - drawn < DRAWN_MS) continue;
        this.draw(changed);
        changed.clear();
        drawn = performance.now();
      }
    } catch (error) {
      if (run === this.run) this.failed(error);
    } finally {
      if (this.filling === run) this.filling = null;
      if (run === this.run) this.draw(changed);
    }
  }

  async older() {
    const button = byId("older");
    button.disabled = true;
    await this.fillUp(this.run, Math.min(this.requests.count + AT_FIRST, MOST));
    button.disabled = false;
  }

  failed(error) {
    if (error instanceof Refused && error.status === 401) {
      leave(server.key ? "This server does not know that key." : "This server wants a key.");
      return;
    }
    this.failures += 1;
    const ms = Math.min(SLOWEST_MS, EVERY_MS * 2 ** (this.failures - 1));
    const why = error instanceof Refused ? `The server answers: ${error.message}.` : "The server cannot be reached.";
    const banner = byId("banner");
    banner.replaceChildren(h("span", null, `${why} What is shown may be old. `),
      h("button", { type: "button", class: "quiet", onclick: () => this.soon(0) }, "Try again now"));
    banner.hidden = false;
    byId("board").hidden = false;
    byId("sign-in").hidden = true;
    byId("who").hidden = false;
    this.soon(ms);
  }

  pause(isPaused) {
    this.isPaused = isPaused;
    const button = byId("pause");
    button.textContent = isPaused ? "Resume" : "Pause";
    button.setAttribute("aria-pressed", String(isPaused));
    if (!isPaused) this.soon(0);
    this.tick();
  }

  tick() {
    const [text, state] = this.isPaused ? ["Paused", "paused"]
      : this.failures ? ["Not connected", "lost"] : this.updated ? ["Live", "on"] : ["Loading…", "wait"];
    const live = byId("live");
    if (live.textContent !== text) live.textContent = text;
    live.dataset.state = state;
    if (!this.isPaused && !this.failures && this.updated) this.sessions.age(this.now);
  }

  open(request, timeline) {
    // Asked for once more: on to the details themselves.
    if (this.details.request === request) byId("details").focus();
    else void this.details.open(request, timeline);
  }

  move(request, timeline) {
    if (this.details.isOpen) {
      timeline.active = request;
      timeline.show(request);
      byId("spoken").textContent = sentence(request, `Request ${request.index + 1}`);
      this.open(request, timeline);
    }
  }

  key(event) {
    if (event.key === "Escape" && this.details.isOpen) this.details.close();
    else if (event.key === "/" && !event.ctrlKey && !/^(INPUT|TEXTAREA)$/.test(event.target.tagName ?? "")) {
      event.preventDefault();
      byId("search").focus();
    }
  }
}

const legend = (tiers) => {
  const key = tiers.join();
  const place = byId("legend");
  if (place.dataset.tiers === key) return;
  place.dataset.tiers = key;
  const one = (name, text) => h("li", null, h("i", { class: `swatch ${name}`, "aria-hidden": "true" }), text);
  place.replaceChildren(
    h("ul", null,
      tiers.map((name, index) => one(`t${Math.min(index, 4)}`, `read from ${tier(name)}`)),
      one("created", "created"), one("uncached", "uncached"), one("lost", "missed in a break"),
      h("li", null, h("i", { class: "swatch triangle", "aria-hidden": "true" }), "break"),
      h("li", null, h("i", { class: "swatch triangle expected", "aria-hidden": "true" }), "expected break")),
    h("p", { class: "keys" }, h("kbd", null, "←"), h("kbd", null, "→"), " move ", h("kbd", null, "B"), " next break ",
      h("kbd", null, "Enter"), " details ", h("kbd", null, "Esc"), " close"));
};

const showBoard = (answer) => {
  byId("sign-in").hidden = true;
  byId("key-form").classList.remove("busy");
  byId("board").hidden = false;
  byId("who").hidden = false;
  byId("model").textContent = answer.model;
  const { org, is_operator: isOperator } = answer.viewer;
  byId("viewer").replaceChildren(isOperator ? "Operator: all organisations" : h("bdi", null, organisation(org)));
  document.body.classList.toggle("operator", isOperator);
  const several = answer.api_processes;
  byId("viewer").title = several ? `Each of ${count(several)} API processes tells what it has served` : "";
};

const leave = (why = "") => {
  board.stop();
  server.forget();
  byId("board").hidden = true;
  byId("who").hidden = true;
  byId("model").textContent = "";
  byId("sign-in").hidden = false;
  byId("key-form").classList.remove("busy");
  const error = byId("key-error");
  error.textContent = why;
  error.hidden = !why;
  byId("key").setAttribute("aria-invalid", String(Boolean(why)));
  byId("key").value = "";
  byId("key").focus();
};

const enter = (key) => {
  const error = byId("key-error");
  // What a header can hold.
  error.hidden = /^[\x20-\x7e\xa0-\xff]*$/.test(key);
  error.textContent = error.hidden ? "" : "No key has such characters.";
  if (!error.hidden) return;
  server.present(key);
  board.start(false);
};

board = new Board();
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = byId("key").value.trim();
  if (key) enter(key);
});
byId("no-key").addEventListener("click", () => enter(""));
byId("leave").addEventListener("click", () => leave());
if (server.hasKey) board.start(true);
else leave();
