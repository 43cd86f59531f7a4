// The details of one request: what became of its tokens, why, and what to do about it.

import { byId, h } from "./dom.js";
import { cause, count, duration, moment, organisation, percent, plural, sessionName, tier } from "./words.js";

const LISTED = 12;

const narrow = matchMedia("(max-width: 48rem)");

export class Details {
  #shown = 0;  // counts what was opened: an answer that comes late is left aside

  constructor(server, tiers, on) {
    this.server = server;
    this.tiers = tiers;
    this.on = on;
    this.element = byId("details");
    this.request = null;
    this.element.addEventListener("keydown", (event) => this.#key(event));
  }

  get isOpen() {
    return this.request !== null;
  }

  async open(request, timeline) {
    this.timeline?.select(null);
    Object.assign(this, { request, timeline });
    timeline.select(request);
    this.element.hidden = false;
    document.body.classList.add("with-details");
    // On a phone the details lie over the lower part of the page.
    if (narrow.matches) timeline.element.closest(".session").scrollIntoView({ block: "start" });
    this.#render(undefined);
    const shown = (this.#shown += 1);
    const answer = await this.server.details(request).catch((error) => ({ failed: error.message }));
    if (shown !== this.#shown || this.request !== request) return;
    this.#render(answer);
    byId("spoken").textContent = this.element.querySelector(".verdict").innerText;
  }

  close({ refocus = true } = {}) {
    if (!this.isOpen) return;
    const { request, timeline } = this;
    this.#shown += 1;
    this.request = null;
    this.element.hidden = true;
    this.element.replaceChildren();
    document.body.classList.remove("with-details");
    timeline.select(null);
    if (refocus) timeline.focus(request);
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.isOpen) return;
    if (event.key === "Enter" || event.key === " ") return;
    // Up and down scroll what is long here.
    if (event.key === "ArrowUp" || event.key === "ArrowDown") return;
    this.#go(this.timeline.target(event, this.request), event);
  }

  #go(request, event) {
    if (!request) return;
    event?.preventDefault();
    this.on.move(request, this.timeline);
  }

  #render(known) {
    const { request } = this;
    const focused = this.element.contains(document.activeElement) ? document.activeElement.dataset.does : null;
    const step = (does, text, label, to) => h("button", {
      type: "button", class: "quiet", "data-does": does, "aria-label": label, title: label, disabled: !to,
      onclick: () => this.#go(to),
    }, text);
    const { timeline } = this;
    this.element.replaceChildren(
      h("header", null,
        h("div", null,
          h("h2", { id: "details-title" }, `Request ${count(request.index + 1)} of ${count(timeline.session.requests.length)}`),
          h("p", { class: "in" }, h("bdi", null, sessionName(request.session)))),
        h("nav", { "aria-label": "Other requests of the session" },
          step("previous", "←", "Previous request", timeline.beside(request, -1)),
          step("next", "→", "Next request", timeline.beside(request, 1)),
          step("break", "▼", "Next break", timeline.beside(request, 1, true)),
          h("button", { type: "button", class: "quiet", "data-does": "close", "aria-label": "Close", title: "Close (Esc)",
            onclick: () => this.close() }, "✕"))),
      h("div", { class: "body" }, this.#verdict(known), this.#tokens(), this.#why(known), this.#facts(known)));
    if (focused) this.element.querySelector(`[data-does="${focused}"]:not(:disabled)`)?.focus() ?? this.element.focus();
  }

  #verdict(known) {
    const { request } = this;
    const [kind, title] = request.isBreak
      ? (request.expected ? ["expected", "Expected break"] : ["break", "Break"])
      : request.cause ? ["fine", "No break"] : ["unknown", "Not compared with others"];
    const box = h("section", { class: `verdict ${kind}` },
      h("p", { class: "kind" }, title),
      h("p", { class: "cause" }, cause(request.cause)));
    if (request.path) box.append(h("p", { class: "path" }, "at ", h("code", null, h("bdi", null, request.path))));
    if (request.missed) {
      box.append(h("p", null, h("b", null, count(request.missed)), ` tokens could have been read and were not`));
    }
    if (known?.waited) box.append(h("p", null, h("bdi", null, `It ${known.waited}`)));
    const suggestion = known?.suggestion;
    if (suggestion) box.append(h("p", { class: "suggestion" }, h("b", null, "What to do "), h("bdi", null, suggestion)));
    for (const one of known?.repaired ?? []) {
      const saved = one.saved_tokens ? `, ${count(one.saved_tokens)} tokens saved` : "";
      box.append(h("p", { class: "repair" }, h("b", null, "Repaired "),
        h("bdi", null, `${one.kind}: ${one.change || one.path}${saved}`)));
    }
    return box;
  }

  #tokens() {
    const { request } = this;
    const rows = [
      ...this.tiers.map((name, index) => [`t${Math.min(index, 4)}`, `Read from ${tier(name)}`, request.read[name] ?? 0]),
      ...Object.entries(request.created).filter(([, tokens]) => tokens)
        .map(([ttl, tokens]) => ["created", `Created, ${ttl === "other" ? "another lifetime" : ttl}`, tokens]),
      ["uncached", "Uncached", request.uncached],
    ].filter(([name, , tokens]) => tokens || name === "uncached");
    const bar = h("div", { class: "split large", "aria-hidden": "true" });
    for (const [name, , tokens] of rows) {
      if (!tokens) continue;
      const part = h("i", { class: name });
      part.style.flexGrow = tokens / request.prompt;
      bar.append(part);
    }
    return h("section", { "aria-label": "Tokens" }, bar,
      h("table", { class: "tokens" }, h("caption", { class: "unseen" }, "Prompt tokens by what became of them"),
        h("thead", { class: "unseen" }, h("tr", null, ...["What", "Tokens", "Share"].map((name) => h("th", { scope: "col" }, name)))),
        h("tbody", null, rows.map(([name, text, tokens]) => h("tr", null,
          h("th", { scope: "row" }, h("i", { class: `swatch ${name}`, "aria-hidden": "true" }), text),
          h("td", null, count(tokens)), h("td", null, percent(tokens, request.prompt))))),
        h("tfoot", null, h("tr", null, h("th", { scope: "row" }, "Prompt"), h("td", null, count(request.prompt)), h("td", null, "")))));
  }

  #why(known) {
    if (known === undefined) return h("p", { class: "note", role: "status" }, "Loading what else is known…");
    if (known === null) return h("p", { class: "note" }, "The server keeps no more of this request.");
    if (known.failed) return h("p", { class: "note error", role: "alert" }, `What else is known could not be loaded: ${known.failed}`);
    const box = h("section", { class: "why" });
    const missed = Object.entries(known.uncached ?? {}).filter(([, tokens]) => tokens).sort((a, b) => b[1] - a[1]);
    if (missed.length) {
      box.append(h("h3", null, "Why the rest was not read"),
        h("table", { class: "tokens" }, h("tbody", null, missed.map(([name, tokens]) => h("tr", null,
          h("th", { scope: "row" }, cause(name)), h("td", null, count(tokens)), h("td", null, percent(tokens, this.request.prompt)))))));
    }
    const changes = known.changes ?? [];
    if (changes.length) {
      box.append(h("h3", null, "What changed"), h("ol", { class: "changes" }, changes.map((change) => this.#change(change))));
      if (known.more_changes) box.append(h("p", { class: "note" }, `and ${plural(known.more_changes, "more change")}`));
    }
    const lost = (known.engine ?? []).filter((miss) => miss.tokens && !["partial_block"].includes(miss.cause));
    if (lost.length) {
      box.append(h("h3", null, "What the cache did"), h("ul", { class: "changes" }, lost.map((miss) => h("li", null,
        h("b", null, cause(miss.cause)), `, ${count(miss.tokens)} tokens`,
        miss.tier ? ` on ${tier(miss.tier)}` : "",
        miss.age_s !== null ? `, ${duration(miss.age_s)} before` : "",
        miss.detail ? h("span", null, ": ", h("bdi", null, miss.detail)) : ""))));
    }
    if (known.latch) {
      box.append(h("p", { class: "note" }, `This place ${known.latch.returns ? "goes back and forth" : "is new each time"}: ` +
        `${plural(known.latch.flips, "change")}, some ${count(known.latch.tokens_lost)} tokens so far.`));
    }
    if (known.diff) box.append(this.#diff(known.diff));
    return box;
  }

  #change(change) {
    const about = (names, more) => {
      const shown = names.slice(0, LISTED);
      const rest = names.length - shown.length + (more ?? 0);
      return shown.join(", ") + (rest ? ` and ${rest} more` : "");
    };
    const line = [h("b", null, cause(change.kind)), " at ", h("code", null, h("bdi", null, change.path))];
    if (change.names.length) line.push(h("span", null, ": ", h("bdi", null, about(change.names, change.more_names))));
    if (change.fields.length) line.push(h("span", null, " (", h("bdi", null, about(change.fields, change.more_fields)), ")"));
    if (change.before !== null || change.after !== null) {
      line.push(h("span", { class: "values" }, h("bdi", null, change.before ?? "none"), " → ", h("bdi", null, change.after ?? "none")));
    }
    if (change.chars_before !== null || change.chars_after !== null) {
      line.push(h("span", { class: "values" }, `${count(change.chars_before ?? 0)} → ${count(change.chars_after ?? 0)} characters`));
    }
    return h("li", null, line);
  }

  #diff(name) {
    const place = h("div", null);
    const load = h("button", { type: "button", class: "primary", "data-does": "diff", onclick: async () => {
      load.disabled = true;
      try {
        const text = await this.server.diff(name);
        const lines = text.replace(/\n$/, "").split("\n").slice(1);
        place.replaceChildren(h("pre", { class: "diff", tabindex: 0, "aria-label": "Diff of what changed" },
          lines.map((line) => h("span", { class: kindOf(line) }, `${line}\n`))));
        load.remove();
      } catch (error) {
        load.disabled = false;
        place.replaceChildren(h("p", { class: "note error", role: "alert" }, error.message));
      }
    } }, "Show the diff");
    return h("section", { class: "with-diff" }, h("h3", null, "Diff"), place, load);
  }

  #facts(known) {
    const { request } = this;
    const lineage = request.lineage === null ? null
      : `#${request.lineage}` + (known?.parent_lineage ? `, branched off #${known.parent_lineage}` : "");
    const rows = [
      ["Finished", moment(request.at)],
      ["First token after", request.ttft === null ? null : duration(request.ttft)],
      ["Prefill saved", request.saved ? duration(request.saved) : null],
      ["Output", request.output ? plural(request.output, "token") : null],
      ["Model", request.model],
      ["Organisation", organisation(request.org)],
      ["Lineage", lineage],
      ["Engine", request.engine === null ? null : `${request.engine}${request.replica ? ` of ${request.replica}` : ""}`],
      ["Request", request.id],
    ].filter(([, value]) => value !== null && value !== "");
    return h("section", { "aria-label": "Facts" }, h("dl", { class: "known" }, rows.map(([name, value]) =>
      h("div", null, h("dt", null, name), h("dd", null, h("bdi", null, value))))));
  }
}

const kindOf = (line) => {
  if (line.startsWith("#") || line.startsWith("+++") || line.startsWith("---") || line.startsWith("@@")) return "head";
  return line.startsWith("+") ? "plus" : line.startsWith("-") ? "minus" : "same";
};
