// The server behind the page. The key goes into a header, and nowhere else.

const KEY = "cachescope key";  // in this tab's storage
const MOST = 500;  // requests in an answer
const AT_ONCE = 200;  // requests in the first answer, so that something is drawn soon

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export class Server {
  #key = null;
  #cursors = new Map();  // by list: each API process has one of its own

  constructor() {
    this.#key = sessionStorage.getItem(KEY);
  }

  get key() {
    return this.#key;
  }

  get hasKey() {
    return this.#key !== null;
  }

  // Use a key from now on; an empty one is none.
  present(key) {
    this.#key = key;
    this.#cursors.clear();
    sessionStorage.setItem(KEY, key);
  }

  forget() {
    this.#key = null;
    this.#cursors.clear();
    sessionStorage.removeItem(KEY);
  }

  // What is new since the last time, newest first: at first the newest there are.
  async news() {
    const after = [...this.#cursors].map(([list, { newest }]) => `${list}.${newest}`).join(",");
    const answer = await this.#get("requests", after ? { after } : { limit: AT_ONCE });
    const known = this.#cursors.get(answer.list);
    const requests = answer.requests;
    let oldest = answer.oldest;
    // More came in between than one answer lists.
    for (let more = known && oldest; more; ) {
      const before = `${answer.list}.${more}`;
      const next = await this.#get("requests", { after: `${answer.list}.${known.newest}`, before });
      if (next.list !== answer.list) break;
      requests.push(...next.requests);
      more = next.oldest;
    }
    oldest = known ? known.oldest : oldest;
    this.#cursors.set(answer.list, { newest: answer.newest, oldest });
    return answer;
  }

  get hasOlder() {
    return [...this.#cursors.values()].some(({ oldest }) => oldest !== null);
  }

  // The next older requests, so many at most; none if there are none.
  async older(most) {
    const before = [...this.#cursors]
      .filter(([, { oldest }]) => oldest !== null)
      .map(([list, { oldest }]) => `${list}.${oldest}`)
      .join(",");
    const answer = await this.#get("requests", { before, limit: Math.min(most, MOST) });
    const known = this.#cursors.get(answer.list);
    // Another API process answers, of which there is nothing older.
    if (!known || known.oldest === null) return { list: answer.list, requests: [] };
    known.oldest = answer.oldest;
    return answer;
  }

  // What else is known of a request; null if nothing is.
  async details(request) {
    const at = Math.round(request.at * 1000);
    return (await this.#get("request", { id: request.id ?? "", at })).details;
  }

  async diff(name) {
    return (await this.#get("diff", { name })).diff;
  }

  async #get(path, query) {
    const headers = this.#key ? { authorization: `Bearer ${this.#key}` } : {};
    const key = this.#key;
    const response = await fetch(`cachescope/${path}?${new URLSearchParams(query)}`, {
      headers, cache: "no-store", credentials: "same-origin", redirect: "error",
      signal: AbortSignal.timeout(20000),
    });
    if (key !== this.#key) throw new Refused(0, "another key is used by now");
    if (response.ok) return response.json();
    const told = await response.json().catch(() => null);
    throw new Refused(response.status, told?.error?.message ?? `the server answers ${response.status}`);
  }
}
