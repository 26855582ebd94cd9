/** Requests to the server that sent this page. Paths are relative, so that the page also works below a prefix of a proxy. */

import { session } from "./storage.js";

const KEY = "belle.api-key";
const UNREACHABLE = "The server can't be reached.";

/** A request that failed: a sentence to show, the HTTP status (0 without an answer), and the parameter at fault if one is. */
export class ApiError extends Error {
  /**
   * @param {string} message
   * @param {{status?: number, param?: ?string}} [details]
   */
  constructor(message, { status = 0, param = null } = {}) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.param = param;
  }
}

/** Whether an error says that the user stopped the request. */
export const isAbort = (error) => error.name === "AbortError";

/** The server's API. It adds the API key, which is kept until the tab is closed. */
export class Api {
  #askForKey;
  #onKey;

  /**
   * @param {(reason: string) => Promise<?string>} askForKey resolves to a key, or to null if the user has none
   * @param {() => void} onKey called when there is a new key
   */
  constructor(askForKey, onKey) {
    this.#askForKey = askForKey;
    this.#onKey = onKey;
  }

  /** Ask for an API key to use from now on. Resolves to whether the user gave one. */
  async renewKey(reason) {
    const key = await this.#askForKey(reason);
    if (!key) return false;
    session.save(KEY, key);
    this.#onKey();
    return true;
  }

  /**
   * Get JSON.
   * @param {string} path
   * @param {{mayAsk?: boolean, timeoutMs?: number}} [options] `mayAsk`: ask the user where an API key is missing or wrong
   */
  async getJson(path, { mayAsk = false, timeoutMs = 10_000 } = {}) {
    const response = await this.#request(path, { mayAsk, signal: AbortSignal.timeout(timeoutMs) });
    return response.json();
  }

  /** Whether requests are sent with an API key. */
  get hasKey() {
    return session.load(KEY) !== null;
  }

  /** Save a document of the server as a file: a link to it would carry no API key. */
  async download(path, name) {
    const response = await this.#request(path, { mayAsk: true });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await response.blob());
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
  }

  /**
   * Begin a chat completion.
   * @param {object} body
   * @param {{signal: AbortSignal, useCache: boolean}} options `useCache`: whether the result cache may answer and keep the answer
   * @returns {Promise<{isCached: boolean, chunks: AsyncGenerator<object>}>} whether the result cache answers, and the answer's
   *   `chat.completion.chunk`s as they come
   */
  async chat(body, { signal, useCache }) {
    const headers = { "Content-Type": "application/json" };
    if (!useCache) headers["Cache-Control"] = "no-cache, no-store";
    const options = { method: "POST", headers, body: JSON.stringify(body), signal, mayAsk: true };
    const response = await this.#request("v1/chat/completions", options);
    return { isCached: response.headers.get("X-Result-Cache") === "hit", chunks: chunksOf(response.body) };
  }

  async #request(path, { mayAsk, ...options }) {
    let response = await this.#send(path, options);
    while (response.status === 401) {
      const error = await errorOf(response);
      if (!mayAsk || !(await this.renewKey(error.message))) throw error;
      response = await this.#send(path, options);
    }
    if (!response.ok) throw await errorOf(response);
    return response;
  }

  async #send(path, options) {
    const key = session.load(KEY);
    const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    try {
      return await fetch(path, { ...options, headers });
    } catch (error) {
      throw isAbort(error) ? error : new ApiError(UNREACHABLE);
    }
  }
}

/** The error that a response reports in OpenAI's form, or its status where it has none. */
async function errorOf(response) {
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `The server answered with status ${response.status}.`;
  return new ApiError(message, { status: response.status, param: body?.error?.param ?? null });
}

async function* chunksOf(body) {
  for await (const data of serverSentEvents(body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, { param: chunk.error.param });
    yield chunk;
  }
  throw new ApiError("The connection ended before the answer did.");
}

/**
 * The data of server-sent events, one event at a time.
 * @param {ReadableStream<Uint8Array>} body
 * @returns {AsyncGenerator<string>}
 */
async function* serverSentEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    for (;;) {
      const { value, done } = await readPart(reader);
      if (done) return;
      const events = (pending + value).split(/\r?\n\r?\n/);
      pending = events.pop();
      yield* events.map(dataOf).filter(Boolean);
    }
  } finally {
    reader.cancel().catch(() => {}); // already failed or aborted: nothing is left to cancel
  }
}

async function readPart(reader) {
  try {
    return await reader.read();
  } catch (error) {
    throw isAbort(error) ? error : new ApiError("The connection broke before the answer ended.");
  }
}

/** The `data` lines of one event. */
function dataOf(event) {
  const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
}
