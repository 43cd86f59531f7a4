// The overview: what was read, what it saves, what broke, and all of it over time.

import { byId, h, s } from "./dom.js";
import { cause, clock, count, day, duration, minutes, money, percent, plural, short, tier } from "./words.js";

const HEIGHT = 168;
const [TOP, BOTTOM, LEFT, RIGHT] = [16, 20, 46, 40];
const WIDTHS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400, 604800];

export class Overview {
  constructor(requests, onBreaks) {
    this.requests = requests;
    this.onBreaks = onBreaks;
    this.window = null;  // seconds; null for all that is loaded
    this.chart = byId("chart");
    byId("windows").addEventListener("change", (event) => {
      this.window = event.target.value ? Number(event.target.value) : null;
      this.draw();
    });
    this.now = Date.now() / 1000;
    new ResizeObserver(() => {
      if (requests.count) this.draw();
    }).observe(this.chart);
  }

  // Keep the places of what is on its way.
  await() {
    byId("overview").hidden = false;
    this.chart.hidden = true;
    const skeleton = () => h("div", { class: "tile card skeleton" });
    byId("tiles").replaceChildren(...Array.from({ length: 4 }, skeleton));
  }

  draw(now = this.now, currency = this.currency) {
    this.now = now;
    this.currency = currency;
    const { requests } = this;
    byId("overview").hidden = !requests.count;
    if (!requests.count) {
      byId("tiles").replaceChildren();
      this.chart.hidden = true;
      byId("covers").textContent = "";
      return;
    }
    const since = this.window === null ? requests.from : Math.max(requests.from, now - this.window);
    const sum = requests.totals(since);
    byId("covers").textContent = sum.requests
      ? `${plural(sum.requests, "request")} since ${day(since) === day(now) ? clock(since) : `${day(since)} ${minutes(since)}`}`
      : "No requests in this time";
    byId("tiles").replaceChildren(this.#rate(sum), this.#cost(sum), this.#compute(sum), this.#breaks(sum));
    this.chart.hidden = !sum.requests;
    if (sum.requests) this.#plot(since, now);
  }

  #tile(kind, title, value, ...rest) {
    return h("section", { class: `tile card ${kind}` }, h("h3", null, title),
      h("p", { class: "value" }, value), ...rest);
  }

  #rate(sum) {
    const bar = h("div", { class: "split", "aria-hidden": "true" });
    const add = (name, tokens) => {
      if (!tokens) return;
      const part = h("i", { class: name });
      part.style.flexGrow = tokens / sum.prompt;
      bar.append(part);
    };
    this.requests.tiers.forEach((name, index) => add(`t${Math.min(index, 4)}`, sum.read.get(name) ?? 0));
    add("created", sum.created);
    add("uncached", sum.uncached);
    const tiers = this.requests.tiers
      .filter((name) => sum.read.get(name))
      .map((name) => `${short(sum.read.get(name))} ${tier(name)}`);
    const what = `${short(sum.readTokens)} of ${short(sum.prompt)} prompt tokens`;
    return this.#tile("rate", "Read from the cache", percent(sum.readTokens, sum.prompt), bar,
      h("p", null, tiers.length > 1 ? `${what}: ${tiers.join(", ")}` : what));
  }

  #cost(sum) {
    const saved = sum.prompt ? 1 - sum.equivalents / sum.prompt : 0;
    const share = sum.prompt ? percent(Math.abs(sum.prompt - sum.equivalents), sum.prompt) : "–";
    const value = `${saved < 0 ? "+" : "−"}${share}`;
    const lines = [`${short(sum.prompt)} tokens cost what ${short(sum.equivalents)} uncached ones would`];
    if (sum.unpriced < sum.requests) {
      const currency = this.currency ?? "USD";
      const some = sum.unpriced ? `, without ${plural(sum.unpriced, "request")} of unknown price` : "";
      lines.push(`${money(sum.costWith, currency)} instead of ${money(sum.costWithout, currency)}${some}`);
    }
    return this.#tile(saved < 0 ? "cost worse" : "cost", "Input cost", value, lines.map((line) => h("p", null, line)));
  }

  #compute(sum) {
    const value = sum.saved ? duration(sum.saved) : "–";
    const text = sum.saved
      ? "of prefill not computed again, at the engine's measured rate"
      : "The engine's prefill rate is not known yet";
    return this.#tile("compute", "Compute saved", value, h("p", null, text));
  }

  #breaks(sum) {
    const causes = [...sum.causes].sort((a, b) => b[1] - a[1]);
    const lines = causes.length
      ? [`${short(sum.missed)} tokens missed. ${causes.slice(0, 2).map(([name, times]) => `${cause(name)} (${times}×)`).join(", ")}`]
      : ["Every prefix was read as far as it could be"];
    if (sum.expectedBreaks) lines.push(`and ${plural(sum.expectedBreaks, "expected break")}`);
    const tile = this.#tile(sum.breaks ? "breaks some" : "breaks", "Breaks", count(sum.breaks), lines.map((line) => h("p", null, line)));
    if (sum.breaks) {
      tile.append(h("button", { type: "button", class: "link", onclick: this.onBreaks }, "Show their sessions"));
    }
    return tile;
  }

  #plot(since, now) {
    const whole = Math.max(this.chart.clientWidth - 24, 160);
    const room = whole - LEFT - RIGHT;
    const most = Math.max(12, Math.min(90, Math.floor(room / 9)));
    const width = WIDTHS.find((one) => (now - since) / one <= most) ?? (now - since) / most;
    const start = Math.floor(since / width) * width;
    const spans = Math.max(1, Math.floor((now - start) / width) + 1);
    const buckets = this.requests.buckets(start, width, spans);
    const tallest = Math.max(...buckets.map((bucket) => bucket.prompt), 1);
    const step = room / Math.max(spans, 12);
    const high = HEIGHT - TOP - BOTTOM;
    const y = (tokens) => HEIGHT - BOTTOM - (tokens / tallest) * high;
    const svg = s("svg", { width: whole, height: HEIGHT, role: "img", "aria-label": this.#told(buckets, width) });
    for (const share of [0, 0.5, 1]) {
      const line = HEIGHT - BOTTOM - share * high + 0.5;
      svg.append(s("line", { class: "grid", x1: LEFT, x2: LEFT + room, y1: line, y2: line }),
        s("text", { class: "scale", x: LEFT - 6, y: line + 4 }, short(share * tallest)),
        s("text", { class: "scale right", x: LEFT + room + 6, y: line + 4 }, `${share * 100} %`));
    }
    const points = [];
    buckets.forEach((bucket, index) => {
      const x = LEFT + index * step;
      let used = 0;
      const draw = (name, tokens) => {
        if (!tokens) return;
        const top = y(used + tokens);
        svg.append(s("rect", { class: name, x: x + 1, y: top, width: Math.max(step - 2, 1), height: y(used) - top }));
        used += tokens;
      };
      this.requests.tiers.forEach((name, tierIndex) => draw(`t${Math.min(tierIndex, 4)}`, bucket.read.get(name) ?? 0));
      draw("created", bucket.created);
      draw("uncached", bucket.uncached);
      if (bucket.prompt) points.push([x + step / 2, HEIGHT - BOTTOM - (bucket.readTokens / bucket.prompt) * high]);
      if (bucket.breaks) {
        const middle = x + step / 2;
        svg.append(s("path", { class: "mark", d: `M${middle - 4} 3H${middle + 4}L${middle} 10Z` },
          s("title", null, plural(bucket.breaks, "break"))));
      }
    });
    if (points.length) {
      svg.append(s("polyline", { class: "hit-rate", points: points.map((point) => point.map((one) => one.toFixed(1)).join(",")).join(" ") }));
      for (const [x, at] of points.length <= 40 ? points : []) svg.append(s("circle", { class: "hit-rate", cx: x, cy: at, r: 2.2 }));
    }
    const every = Math.ceil(72 / step);
    for (let index = 0; index < spans; index += every) {
      const at = start + index * width;
      const text = width >= 86400 ? day(at) : width < 60 ? clock(at) : minutes(at);
      svg.append(s("text", { class: "time", x: LEFT + index * step + 1, y: HEIGHT - 5 }, text));
    }
    this.chart.replaceChildren(
      h("figcaption", null, h("span", null, `Prompt tokens each ${duration(width)}`), h("span", { class: "line-key" }, "share read")), svg);
  }

  #told(buckets, width) {
    const used = buckets.filter((bucket) => bucket.requests);
    const [first, last] = [used[0], used.at(-1)];
    const share = ({ readTokens, prompt }) => percent(readTokens, prompt);
    return `Prompt tokens each ${duration(width)}. Share read: ${share(first)} at ${clock(first.at)}, ` +
      `${share(last)} at ${clock(last.at)}. Breaks: ${used.reduce((sum, bucket) => sum + bucket.breaks, 0)}.`;
  }
}
