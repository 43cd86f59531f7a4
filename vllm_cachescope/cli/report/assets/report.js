// The report: what is in this file, drawn.

import { Details } from "./details.js";
import { byId, h } from "./dom.js";
import { heat } from "./heat.js";
import { Requests } from "./requests.js";
import { Sessions } from "./sessions.js";
import { count, percent, plural, sentence, tier } from "./words.js";

const { summary, rows, names } = JSON.parse(byId("data").textContent);

const WAYS = {
  without: "Without caching", recorded: "As recorded", "5m": "All at 5m", "1h": "All at 1h",
  uniform: "Best for all agents alike", best: "Best mix",
};
const SCOPES = { prompt: "twice in one prompt", session: "from the same session", org: "from other sessions" };

const cell = (value, isNumber) => h("td", isNumber ? { class: "number" } : null, value);

// A table: `columns` are names, those of numbers with a leading "#".
const table = (place, columns, lines) => {
  const isNumber = columns.map((name) => name.startsWith("#"));
  byId(place).replaceChildren(h("table", { class: "report" },
    h("thead", null, h("tr", null, columns.map((name, i) =>
      h("th", { scope: "col", class: isNumber[i] ? "number" : null }, name.replace("#", ""))))),
    h("tbody", null, lines.map(({ kind, values }) => h("tr", { class: kind }, values.map((value, i) =>
      (i ? cell(value, isNumber[i]) : h("th", { scope: "row" }, h("bdi", null, value)))))))));
};
const say = (place, text) => { byId(place).textContent = text; };

const agentName = ({ agent, model, tools }) => {
  const told = [model, tools ? plural(tools, "tool") : ""].filter(Boolean).join(", ");
  return `Agent ${agent + 1}${told ? ` (${told})` : ""}`;
};

const isPriced = !summary.unpriced_models.length;
const money = (cost) => (isPriced ? `${cost.cost.toFixed(3)} ${summary.currency}` : `${count(cost.equivalents)} tokens`);

const costs = () => {
  const all = Object.entries(summary.costs);
  const cheapest = Math.min(...all.map(([, cost]) => cost.equivalents));
  table("costs", ["Prompts", "#Read", "#Written, 5m", "#Written, 1h", "#Uncached", "#Cost", "#Saved"],
    all.map(([way, cost]) => ({
      kind: way === "best" && cost.equivalents <= cheapest ? "best" : null,
      values: [WAYS[way], count(cost.read), count(cost.written_5m), count(cost.written_1h), count(cost.uncached),
        money(cost), way === "without" || cost.saved === null ? "" : `${(100 * cost.saved).toFixed(1)} %`],
    })));
  say("costs-note", isPriced ? "by the rules of Anthropic's API" : "in fresh input tokens: no price is known");
  const now = summary.costs.recorded ?? summary.costs["5m"];
  const key = isPriced ? "cost" : "equivalents";
  const more = now[key] - summary.costs.best[key];
  say("best-note", `would save ${isPriced ? `${more.toFixed(3)} ${summary.currency}` : `${count(more)} tokens`} ` +
    `(${now[key] ? ((100 * more) / now[key]).toFixed(1) : 0} %)`);
  const agents = [...summary.markings.agents].sort((a, b) => b.tokens - a.tokens);
  table("best", ["Agent", "#Calls", "#Tokens", "#Read", "Breakpoints"],
    agents.slice(0, 50).map((one) => ({ values:
      [agentName(one), count(one.calls), count(one.tokens), percent(one.read, one.tokens), one.breakpoints] })));
};

const breaks = () => {
  const { groups, calls, missed_tokens: missed } = summary.breaks;
  say("breaks-note", calls ? `${plural(calls, "break")}, ${count(missed)} tokens missed` : "");
  if (!calls) byId("breaks").replaceChildren(h("p", null, "No prefix broke."));
  else table("breaks", ["Rule", "Where", "#Calls", "#Tokens missed", "What to do"],
    groups.slice(0, 50).map((one) => ({ values: [
      h("span", { class: one.level === "warning" ? "cause" : "cause expected" }, `${one.code} ${one.rule.replaceAll("_", " ")}`),
      h("bdi", null, one.place), count(one.calls), count(one.missed_tokens), one.suggestion] })));
};

const elsewhere = () => {
  const { tokens, by_tool: tools, by_file: files, by_scope: scopes } = summary.elsewhere;
  say("elsewhere-note", "what a cache could read besides that reuses content wherever it stands");
  if (!tokens) {
    byId("elsewhere").replaceChildren(h("p", null, "Nothing is repeated."));
    return;
  }
  const lines = (counts, kind) => Object.entries(counts).slice(0, 25).map(([name, n]) => ({ values: [name, kind, count(n)] }));
  table("elsewhere", ["What", "", "#Tokens"], [
    { values: ["All of it", percent(tokens, summary.tokens), count(tokens)] },
    ...Object.entries(scopes).map(([scope, n]) => ({ values: [SCOPES[scope] ?? scope, "scope", count(n)] })),
    ...lines(tools, "content"), ...lines(files, "file")]);
};

// The requests as the page of a server has them.
const requests = new Requests();
requests.add("", rows.map((row) => ({ ...row, session: names[row.session] })));
const detailsOf = new Map(rows.map((row) => [row.number, row]));
for (const session of requests.sessions.values()) {
  for (const request of session.requests) request.shared = detailsOf.get(request.number).shared;
}
const here = {
  details: async ({ number }) => {
    const { suggestion, changes } = detailsOf.get(number);
    return { suggestion, changes: changes ?? [] };
  },
};
let details = null;
const on = {
  open: (request, timeline) => void details.open(request, timeline),
  move: (request, timeline) => {
    if (!details.isOpen) return;
    timeline.active = request;
    timeline.show(request);
    byId("spoken").textContent = sentence(request, `Request ${request.index + 1}`);
    void details.open(request, timeline);
  },
};
details = new Details(here, requests.tiers, on);
const sessions = new Sessions(requests, on);

const legend = () => {
  const one = (name, text) => h("li", null, h("i", { class: `swatch ${name}`, "aria-hidden": "true" }), text);
  byId("legend").replaceChildren(
    h("ul", null, requests.tiers.map((name, i) => one(`t${Math.min(i, 4)}`, `read from the ${tier(name)}`)),
      one("created", "created"), one("uncached", "uncached"), one("lost", "missed in a break"),
      h("li", null, h("i", { class: "swatch triangle", "aria-hidden": "true" }), "break"),
      h("li", null, h("i", { class: "swatch triangle expected", "aria-hidden": "true" }), "expected break")),
    h("p", { class: "keys" }, h("kbd", null, "←"), h("kbd", null, "→"), " move ", h("kbd", null, "B"), " next break ",
      h("kbd", null, "Enter"), " details ", h("kbd", null, "Esc"), " close"));
};

const stable = () => {
  const which = byId("which");
  const shown = summary.sessions.filter(({ session }) => [...requests.sessions.values()].some(({ name }) => name === session));
  which.replaceChildren(...shown.map(({ session, calls }, i) => h("option", { value: i }, `${session}, ${plural(calls, "call")}`)));
  const draw = () => {
    const one = shown[Number(which.value)];
    if (!one) return;
    table("phases", ["Phase", "#Calls", "#Tokens", "#Shared", "Began"], one.phases.map((phase, i) => ({ values: [
      `${i + 1}`, `${count(phase.first_call)}–${count(phase.last_call)}`, count(phase.tokens),
      `${(100 * phase.share).toFixed(2)} %`, phase.began] })));
    const session = [...requests.sessions.values()].find(({ name }) => name === one.session);
    byId("heat").replaceChildren(...heat(session), h("figcaption", null,
      "A column is a call, its prompt from top to bottom. The bluer, the longer this stretch has been the same; grey is new; ",
      "red was shared before and changed."));
  };
  which.addEventListener("change", draw);
  byId("stable").hidden = !shown.length;
  draw();
};

say("facts", `${plural(summary.calls, "call")}, ${count(summary.tokens)} prompt tokens, ` +
  `${percent(summary.shared_tokens, summary.tokens)} shared with earlier calls`);
const left = summary.calls - rows.length;
const told = [
  left ? `${count(left)} calls of ${count(summary.calls)} are counted, and not drawn: those of the smaller sessions.` : "",
  summary.untimed_calls ? `${count(summary.untimed_calls)} calls tell no time; they are taken to follow each other at equal distances.` : "",
].filter(Boolean);
byId("banner").textContent = told.join(" ");
byId("banner").hidden = !told.length;
costs();
breaks();
elsewhere();
legend();
sessions.update([], Math.max(0, ...rows.map(({ at }) => at)));
stable();
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && details.isOpen) details.close();
  else if (event.key === "/" && !event.ctrlKey && !/^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName ?? "")) {
    event.preventDefault();
    byId("search").focus();
  }
});
