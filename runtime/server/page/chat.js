/** The chat: turns, the field for messages, and the one answer that may be under way. */

import { isAbort } from "./api.js";
import { Turn } from "./turn.js";

/** How near to its end, in pixels, a log is taken to be read at its end, and follows what comes. */
const NEAR_END = 60;

export class Chat {
  #api;
  #parameters;
  #model;
  #announce;
  #turns = [];
  #controller = null;
  #log = document.getElementById("log");
  #list = document.getElementById("turns");
  #prompt = document.getElementById("prompt");
  #send = document.getElementById("send");
  #stop = document.getElementById("stop");
  #notice = document.getElementById("notice");

  /**
   * @param {{api: Api, parameters: Parameters, model: () => (string | undefined), announce: (text: string) => void}} parts
   */
  constructor({ api, parameters, model, announce }) {
    this.#api = api;
    this.#parameters = parameters;
    this.#model = model;
    this.#announce = announce;
    document.getElementById("composer").addEventListener("submit", (event) => this.#submit(event));
    this.#prompt.addEventListener("keydown", (event) => this.#pressed(event));
    this.#prompt.addEventListener("input", () => this.#fitPrompt());
    this.#stop.addEventListener("click", () => this.stop());
    this.#followGrowth();
  }

  /** Send a message, unless an answer is under way. */
  send(text) {
    if (!text.trim() || !this.#canAsk()) return;
    const retry = () => this.#canAsk() && this.#answer(turn);
    const turn = new Turn(text.trim(), { onRetry: retry, announce: this.#announce });
    this.#turns.push(turn);
    this.#list.append(turn.element);
    this.#prompt.value = "";
    this.#fitPrompt();
    this.#answer(turn);
  }

  /** Stop the answer that is under way, if one is. */
  stop() {
    this.#controller?.abort();
  }

  /** Forget all turns. */
  clear() {
    this.stop();
    this.#turns = [];
    this.#list.replaceChildren();
    this.#notice.textContent = "";
    this.#prompt.focus();
  }

  /** Whether no answer is under way and no parameter is wrong; says which one is. */
  #canAsk() {
    this.#notice.textContent = this.#parameters.problem();
    return !this.#controller && !this.#notice.textContent;
  }

  async #answer(turn) {
    this.#controller = new AbortController();
    this.#showState();
    turn.start();
    this.#log.scrollTop = this.#log.scrollHeight;
    try {
      await this.#receive(turn, this.#controller.signal);
    } finally {
      this.#controller = null;
      this.#showState();
    }
  }

  async #receive(turn, signal) {
    try {
      const { isCached, chunks } = await this.#api.chat(this.#request(turn), { signal, useCache: this.#parameters.useCache });
      turn.isCached = isCached;
      for await (const chunk of chunks) turn.take(chunk);
      turn.finish();
      this.#announce(`Answer: ${turn.answer}`);
    } catch (error) {
      if (isAbort(error)) {
        turn.stop();
        this.#announce("Stopped");
      } else {
        const message = this.#parameters.explain(error.param, error.message);
        turn.fail(message);
        this.#announce(message);
      }
    }
  }

  /** The body of the request for a turn: what was said before it is its history. */
  #request(turn) {
    const { system } = this.#parameters;
    const before = this.#turns.slice(0, this.#turns.indexOf(turn)).flatMap((earlier) => earlier.messages);
    return {
      model: this.#model(),
      messages: [...(system ? [{ role: "system", content: system }] : []), ...before, turn.asked],
      stream: true,
      stream_options: { include_usage: true },
      ...this.#parameters.values(),
    };
  }

  #submit(event) {
    event.preventDefault();
    this.#prompt.focus();
    this.send(this.#prompt.value);
  }

  /** Enter sends, but not while an input method composes: Safari then reports key code 229 and no composition. */
  #pressed(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    this.#submit(event);
  }

  /** Let the field be as high as its text, up to the limit of its style. */
  #fitPrompt() {
    this.#prompt.style.height = "auto";
    this.#prompt.style.height = `${this.#prompt.scrollHeight}px`;
  }

  #showState() {
    const running = this.#controller !== null;
    const focused = [this.#stop, this.#send].includes(document.activeElement);
    this.#send.hidden = running;
    this.#stop.hidden = !running;
    this.#list.classList.toggle("running", running);
    if (focused) this.#prompt.focus();
  }

  /** Keep the end of the log in view while an answer grows, unless the reader has scrolled up. */
  #followGrowth() {
    let atEnd = true;
    this.#log.addEventListener("scroll", () => {
      atEnd = this.#log.scrollHeight - this.#log.scrollTop - this.#log.clientHeight < NEAR_END;
    });
    const observer = new ResizeObserver(() => {
      if (atEnd) this.#log.scrollTop = this.#log.scrollHeight;
    });
    observer.observe(this.#list);
    observer.observe(this.#log);
  }
}
