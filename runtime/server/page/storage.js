/** Values that outlive a reload. Browsers may forbid storage to a page; values are then kept by the page alone. */

class Store {
  #kept = new Map();
  #area;

  /** @param {"localStorage" | "sessionStorage"} area */
  constructor(area) {
    this.#area = area;
  }

  /** @returns {?string} */
  load(name) {
    try {
      return window[this.#area].getItem(name);
    } catch {
      return this.#kept.get(name) ?? null;
    }
  }

  save(name, text) {
    try {
      window[this.#area].setItem(name, text);
    } catch {
      this.#kept.set(name, text);
    }
  }
}

/** Kept by this browser. */
export const local = new Store("localStorage");
/** Kept until the tab is closed. */
export const session = new Store("sessionStorage");
