// The requests that are loaded, by session, and what they add up to.

const shown = (one) => {
  const read = one.read ?? {};
  const readTokens = Object.values(read).reduce((a, b) => a + b, 0);
  const created = one.created ?? {};
  const createdTokens = Object.values(created).reduce((a, b) => a + b, 0);
  const uncached = one.uncached ?? 0;
  const expected = one.expected ?? true;
  return {
    list: one.list,
    number: one.number,
    id: one.request_id ?? null,
    at: one.at,
    org: one.org,
    session: one.session ?? null,
    lineage: one.lineage ?? null,
    model: one.model ?? "",
    replica: one.replica ?? "",
    engine: one.engine ?? null,
    read,
    readTokens,
    created,
    createdTokens,
    uncached,
    prompt: readTokens + createdTokens + uncached,
    output: one.output_tokens ?? 0,
    equivalents: one.equivalents ?? 0,
    costWith: one.cost_with ?? null,
    costWithout: one.cost_without ?? null,
    saved: one.prefill_seconds_saved ?? 0,
    ttft: one.ttft_s ?? null,
    cause: one.cause ?? null,
    expected,
    region: one.region ?? null,
    path: one.path ?? null,
    missed: one.missed_tokens ?? 0,
    isBreak: one.region !== undefined || !expected,
  };
};

// A list may give the number of a request that was purged to another one.
const idOf = ({ list, number, at }) => `${list}.${number}.${at}`;

const inOrder = (a, b) => a.at - b.at || a.number - b.number;

// One session's requests in order, each with its lane: its lineage, by order of appearance.
class Session {
  constructor(key, request) {
    this.key = key;
    this.org = request.org;
    this.name = request.session;
    this.requests = [];
    this.changed = 0;
  }

  add(requests) {
    this.requests.push(...requests);
    this.requests.sort(inOrder);
    this.lanes = new Map();
    const sum = { read: 0, prompt: 0, breaks: 0, expectedBreaks: 0, missed: 0, tallest: 1 };
    this.requests.forEach((request, index) => {
      if (!this.lanes.has(request.lineage)) this.lanes.set(request.lineage, this.lanes.size);
      request.lane = this.lanes.get(request.lineage);
      request.index = index;
      sum.read += request.readTokens;
      sum.prompt += request.prompt;
      sum.tallest = Math.max(sum.tallest, request.prompt);
      if (request.isBreak) {
        sum.missed += request.missed;
        if (request.expected) sum.expectedBreaks += 1;
        else sum.breaks += 1;
      }
    });
    Object.assign(this, sum);
    this.changed += 1;
  }

  // Let go of what was before a moment.
  keep(from) {
    const kept = this.requests.filter(({ at }) => at >= from);
    this.requests = [];
    this.add(kept);
  }

  get latest() {
    return this.requests.at(-1).at;
  }
}

export class Requests {
  #known = new Set();

  constructor() {
    this.sessions = new Map();
    this.count = 0;
    this.tiers = [];  // names in the order in which they are drawn, the nearest tier first
    this.from = Infinity;
  }

  // Add what a server has listed; return the sessions that changed.
  add(list, listed) {
    const fresh = new Map();
    for (const one of listed) {
      const id = idOf({ ...one, list });
      if (this.#known.has(id)) continue;
      this.#known.add(id);
      const request = shown({ ...one, list });
      const key = JSON.stringify([request.org, request.session]);
      if (!fresh.has(key)) fresh.set(key, []);
      fresh.get(key).push(request);
      this.from = Math.min(this.from, request.at);
      for (const tier of Object.keys(request.read)) this.#meet(tier);
    }
    for (const [key, requests] of fresh) {
      if (!this.sessions.has(key)) this.sessions.set(key, new Session(key, requests[0]));
      this.sessions.get(key).add(requests);
      this.count += requests.length;
    }
    return [...fresh.keys()];
  }

  // What was requested since a moment, added up.
  totals(since) {
    const sum = {
      requests: 0, prompt: 0, read: new Map(), readTokens: 0, created: 0, uncached: 0, output: 0,
      equivalents: 0, costWith: 0, costWithout: 0, unpriced: 0, saved: 0, missed: 0,
      breaks: 0, expectedBreaks: 0, causes: new Map(), sessions: 0,
    };
    for (const session of this.sessions.values()) {
      if (session.latest < since) continue;
      sum.sessions += 1;
      for (const request of session.requests) {
        if (request.at >= since) addTo(sum, request);
      }
    }
    return sum;
  }

  // The same by span of time: `spans` spans of `width` seconds from `since` on.
  buckets(since, width, spans) {
    const found = Array.from({ length: spans }, (_, index) => ({
      at: since + index * width, prompt: 0, read: new Map(), readTokens: 0, created: 0,
      uncached: 0, breaks: 0, requests: 0,
    }));
    for (const session of this.sessions.values()) {
      if (session.latest < since) continue;
      for (const request of session.requests) {
        const bucket = found[Math.floor((request.at - since) / width)];
        if (!bucket) continue;
        bucket.requests += 1;
        bucket.prompt += request.prompt;
        bucket.readTokens += request.readTokens;
        bucket.created += request.createdTokens;
        bucket.uncached += request.uncached;
        bucket.breaks += request.isBreak && !request.expected ? 1 : 0;
        for (const [tier, tokens] of Object.entries(request.read)) {
          bucket.read.set(tier, (bucket.read.get(tier) ?? 0) + tokens);
        }
      }
    }
    return found;
  }

  clear() {
    this.#known.clear();
    this.sessions.clear();
    this.count = 0;
    this.tiers.length = 0;
    this.from = Infinity;
  }

  // Let the oldest go, so that `most` are left, give or take some of the same moment.
  trim(most) {
    const all = [...this.sessions.values()].flatMap((session) => session.requests);
    const from = all.map(({ at }) => at).sort((a, b) => b - a)[most - 1] ?? 0;
    for (const [key, session] of this.sessions) {
      if (session.latest < from) this.sessions.delete(key);
      else if (session.requests[0].at < from) session.keep(from);
    }
    const kept = [...this.sessions.values()].flatMap((session) => session.requests);
    this.#known = new Set(kept.map(idOf));
    this.count = kept.length;
    this.from = from;
  }

  #meet(tier) {
    if (this.tiers.includes(tier)) return;
    const near = ["device", "cpu"];
    const rank = (name) => (near.includes(name) ? near.indexOf(name) : near.length);
    this.tiers.push(tier);
    this.tiers.sort((a, b) => rank(a) - rank(b));
  }
}

const addTo = (sum, request) => {
  sum.requests += 1;
  sum.prompt += request.prompt;
  sum.readTokens += request.readTokens;
  sum.created += request.createdTokens;
  sum.uncached += request.uncached;
  sum.output += request.output;
  sum.equivalents += request.equivalents;
  sum.saved += request.saved;
  if (request.costWith === null) sum.unpriced += 1;
  else {
    sum.costWith += request.costWith;
    sum.costWithout += request.costWithout;
  }
  for (const [tier, tokens] of Object.entries(request.read)) {
    sum.read.set(tier, (sum.read.get(tier) ?? 0) + tokens);
  }
  if (!request.isBreak) return;
  if (request.expected) sum.expectedBreaks += 1;
  else {
    sum.breaks += 1;
    sum.missed += request.missed;
    sum.causes.set(request.cause, (sum.causes.get(request.cause) ?? 0) + 1);
  }
};
