/** The form of parameters. Its fields have the names of the API's; one that is left empty is not sent. */

import { local } from "./storage.js";

const STORED = "belle.parameters";
/** Fields that are no parameters of the same name. */
const SYSTEM = "system";
const USE_CACHE = "use_cache";

export class Parameters {
  #form;

  /** @param {HTMLFormElement} form */
  constructor(form) {
    this.#form = form;
    this.#restore();
    form.addEventListener("input", (event) => {
      this.#clearError(event.target);
      this.#store();
    });
    form.addEventListener("submit", (event) => event.preventDefault());
    form.querySelector("#reset-parameters").addEventListener("click", () => this.#reset());
  }

  /** Show the engine's defaults in the fields that are empty. */
  showDefaults(defaults) {
    for (const [name, value] of Object.entries(defaults)) {
      const field = this.#field(name);
      if (field && value !== null) field.placeholder = String(value);
    }
  }

  /** What is wrong with an entry, as one sentence that names its field; empty if nothing is. */
  problem() {
    const problems = this.#fields().map((field) => [field.name, field.validationMessage || imprecision(field)]);
    const [name, message] = problems.find(([, found]) => found) ?? [];
    return message ? this.explain(name, message) : "";
  }

  /** Show at the field of a parameter, if it has one, what is wrong; returns the message with the field's name. */
  explain(name, message) {
    const field = name && this.#field(name);
    if (!field) return message;
    this.#clearError(field);
    const note = document.createElement("p");
    Object.assign(note, { id: errorId(field), className: "error", textContent: message });
    field.after(note);
    field.setAttribute("aria-invalid", "true");
    field.setAttribute("aria-errormessage", note.id);
    return message.includes(name) ? message : `${field.labels[0].textContent.trim()}: ${message}`;
  }

  /** Parameters of a request, without those left to the engine. */
  values() {
    const filled = this.#fields().filter((field) => field.value && ![SYSTEM, USE_CACHE].includes(field.name));
    return Object.fromEntries(filled.map((field) => [field.name, field.type === "number" ? field.valueAsNumber : field.value]));
  }

  /** The system prompt; empty for none. */
  get system() {
    return this.#field(SYSTEM).value.trim();
  }

  /** Whether the result cache may answer. */
  get useCache() {
    return this.#field(USE_CACHE).checked;
  }

  #fields() {
    return [...this.#form.elements].filter((field) => field.name);
  }

  #field(name) {
    return this.#fields().find((field) => field.name === name);
  }

  #clearError(field) {
    document.getElementById(errorId(field))?.remove();
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-errormessage");
  }

  #reset() {
    this.#form.reset();
    this.#fields().forEach(this.#clearError);
    this.#store();
  }

  #store() {
    const entries = this.#fields().map((field) => [field.name, field.type === "checkbox" ? field.checked : field.value]);
    local.save(STORED, JSON.stringify(Object.fromEntries(entries)));
  }

  #restore() {
    const stored = JSON.parse(local.load(STORED) ?? "{}");
    for (const field of this.#fields()) {
      const value = stored[field.name];
      if (field.type === "checkbox") field.checked = value ?? field.checked;
      else field.value = value ?? "";
    }
  }
}

const errorId = (field) => `${field.id}-error`;

/** JavaScript's numbers hold whole numbers of up to 53 bits; a larger one would be sent rounded. */
function imprecision(field) {
  const rounded = field.step === "1" && field.value && !Number.isSafeInteger(field.valueAsNumber);
  return rounded ? `Enter a whole number of at most ${Number.MAX_SAFE_INTEGER}.` : "";
}
