/** One question of a chat and its answer, as they are shown. */

import { copyFrom } from "./clipboard.js";
import { counted, duration, figure } from "./format.js";
import { showText } from "./rich-text.js";

/** What a turn's end says besides the model's own. */
const ENDS = { length: "ended at max tokens", stopped: "stopped" };

export class Turn {
  answer = "";
  /** Whether the result cache gave the answer. */
  isCached = false;
  #question;
  #element;
  #frame = 0;
  #sentAt = 0;
  #firstAt = 0;
  #lastAt = 0;
  #usage = null;
  #end = "";

  /**
   * @param {string} question
   * @param {{onRetry: () => void, announce: (text: string) => void}} handlers
   */
  constructor(question, { onRetry, announce }) {
    this.#question = question;
    this.#element = document.getElementById("turn").content.firstElementChild.cloneNode(true);
    this.#part(".question .text").textContent = question;
    this.#part(".retry").addEventListener("click", onRetry);
    this.#part(".copy").addEventListener("click", (event) => copyFrom(event.currentTarget, this.answer, announce));
  }

  get element() {
    return this.#element;
  }

  /** The messages of this turn as later requests carry them: none where nothing was answered. */
  get messages() {
    return this.answer ? [this.asked, { role: "assistant", content: this.answer }] : [];
  }

  /** The message that asks. */
  get asked() {
    return { role: "user", content: this.#question };
  }

  /** Begin or begin again. */
  start() {
    this.answer = this.#end = "";
    this.#usage = null;
    this.isCached = false;
    this.#firstAt = 0;
    this.#sentAt = performance.now();
    this.#show();
    this.#part(".error").hidden = this.#part("footer").hidden = true;
    this.#part(".answer").setAttribute("aria-busy", "true");
  }

  /** Take one chunk of the stream. */
  take(chunk) {
    const choice = chunk.choices?.[0];
    const text = choice?.delta?.content;
    if (text) {
      this.#lastAt = performance.now();
      this.#firstAt ||= this.#lastAt;
      this.answer += text;
      this.#frame ||= requestAnimationFrame(() => this.#show());
    }
    this.#end = choice?.finish_reason ?? this.#end;
    this.#usage = chunk.usage ?? this.#usage;
  }

  /** End with what came so far. */
  stop() {
    this.#end = "stopped";
    this.finish();
  }

  /** End with an error, after what came so far. */
  fail(message) {
    this.#part(".error").textContent = message;
    this.#part(".error").hidden = false;
    this.finish();
  }

  finish() {
    this.#show();
    this.#part(".usage").textContent = this.#summary().join(" · ");
    this.#part(".copy").hidden = !this.answer;
    this.#part("footer").hidden = false;
    this.#part(".answer").removeAttribute("aria-busy");
  }

  #part(selector) {
    return this.#element.querySelector(selector);
  }

  #show() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    showText(this.#part(".answer .text"), this.answer);
  }

  /** Tokens, speed, time to the first token, and what caches gave. */
  #summary() {
    const { completion_tokens: tokens, prompt_tokens: prompt, prompt_tokens_details: details } = this.#usage ?? {};
    const seconds = (this.#lastAt - this.#firstAt) / 1000;
    const cached = details?.cached_tokens;
    return [
      tokens && counted(tokens, "token"),
      !this.isCached && tokens > 1 && seconds > 0 && `${figure((tokens - 1) / seconds)} tokens/s`,
      this.#firstAt && `first token ${duration((this.#firstAt - this.#sentAt) / 1000)}`,
      cached && `${cached.toLocaleString("en")} of ${counted(prompt, "prompt token")} cached`,
      this.isCached && "from the result cache",
      ENDS[this.#end],
    ].filter(Boolean);
  }
}
