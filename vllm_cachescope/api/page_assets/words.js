// Numbers, times and causes in words.

const WHOLE = new Intl.NumberFormat("en");
const SHORT = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

export const count = (number) => WHOLE.format(Math.round(number));
export const short = (number) => (Math.abs(number) < 10000 ? count(number) : SHORT.format(number));
export const plural = (number, one, many = `${one}s`) => `${short(number)} ${number === 1 ? one : many}`;

// 100 % and 0 % only where it is all or nothing.
export const percent = (part, whole) => {
  if (!whole) return "–";
  const share = (100 * part) / whole;
  if (share === 0 || share === 100) return `${share} %`;
  return `${Math.min(99.9, Math.max(0.1, share)).toFixed(1)} %`;
};

export const duration = (seconds) => {
  if (seconds < 0.0995) return `${Math.max(0, seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0)} ms`;
  if (seconds < 10) return `${seconds.toFixed(seconds < 1 ? 2 : 1)} s`;
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const units = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const first = units.findIndex(([, size]) => seconds >= size);
  const [[name, size], [nextName, nextSize]] = [units[first], units[first + 1]];
  const whole = Math.floor(seconds / size);
  const rest = Math.floor((seconds - whole * size) / nextSize);
  return rest && whole < 10 ? `${whole} ${name} ${rest} ${nextName}` : `${whole} ${name}`;
};

export const money = (amount, currency) => {
  const digits = Math.abs(amount) < 1 ? 4 : 2;
  try {
    return new Intl.NumberFormat("en", {
      style: "currency", currency, minimumFractionDigits: digits, maximumFractionDigits: digits,
    }).format(amount);
  } catch {
    return `${amount.toFixed(digits)} ${currency}`;  // no currency's code
  }
};

const CLOCK = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const MINUTES = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });
const DAY = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short" });

export const clock = (at) => CLOCK.format(at * 1000);
export const minutes = (at) => MINUTES.format(at * 1000);
export const day = (at) => DAY.format(at * 1000);
export const moment = (at) => `${day(at)}, ${clock(at)}`;
// In whole units, for where there is little room.
export const roughly = (seconds) => {
  const [name, size] = [["d", 86400], ["h", 3600], ["min", 60]].find(([, one]) => seconds >= one) ?? ["s", 1];
  return `${Math.floor(seconds / size)} ${name}`;
};
export const ago = (seconds) => (seconds < 2 ? "just now" : `${roughly(seconds)} ago`);

const CAUSES = {
  first_request: "First request of the session",
  new_lineage: "A new conversation",
  continuation: "Continues a conversation",
  retry: "The same request again",
  fork: "Branches off a conversation",
  context_compacted: "The client compacted its context",
  model_changed: "The model changed",
  params_changed: "A parameter changed",
  tools_changed: "The tools changed",
  system_changed: "The system prompt changed",
  messages_changed: "Earlier messages changed",
  markers_changed: "The cache markers changed",
  expired: "The prefix expired",
  evicted: "The prefix was evicted",
  never_stored: "The prefix was never stored",
  cut_off: "An earlier request was cut off",
  scope_changed: "The scope changed",
  tier_unavailable: "A tier was unavailable",
  timed_out: "A tier took too long",
  engine_restarted: "The engine was restarted",
  other_replica: "It was on another replica",
  hash_settings_differ: "The engines' hash settings differ",
  rendered_differently: "The template rendered it differently",
  not_looked_up: "The cache was not looked up",
  partial_block: "A block that is not full",
  no_checkpoint: "No state was kept there",
  new_content: "New content",
  unknown: "Unknown: please report it",
};

export const cause = (name) => {
  if (!name) return "Not diagnosed";
  if (Object.hasOwn(CAUSES, name)) return CAUSES[name];
  const words = String(name).replaceAll("_", " ");
  return words.charAt(0).toUpperCase() + words.slice(1);
};

const TIERS = { device: "device", cpu: "CPU" };
export const tier = (name) => (Object.hasOwn(TIERS, name) ? TIERS[name] : name);

export const organisation = (org) => {
  if (org === "anonymous") return "without a key";
  const [kind, ...rest] = org.split(":");
  if ((kind === "name" || kind === "header") && rest.length) return rest.join(":");
  return org;
};

export const sessionName = (session) => (session === null ? "No session named" : session);

// What one request was, in a sentence, for those who hear the page.
export const sentence = (request, place) => {
  const parts = [`${place}, ${clock(request.at)}`, `${count(request.prompt)} tokens`];
  const read = Object.entries(request.read).filter(([, tokens]) => tokens);
  for (const [name, tokens] of read) parts.push(`${count(tokens)} read from ${tier(name)}`);
  if (!read.length) parts.push("none read");
  parts.push(`${count(request.createdTokens)} created`, `${count(request.uncached)} uncached`);
  if (request.isBreak) {
    const kind = request.expected ? "expected break" : "break";
    parts.push(`${kind}: ${cause(request.cause)}, ${count(request.missed)} tokens missed`);
  }
  return parts.join(", ");
};
