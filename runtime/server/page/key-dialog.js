/** The dialog that asks for an API key. */

/** Ask for a key, one dialog for all who wait. */
export class KeyDialog {
  #dialog = document.getElementById("key-dialog");
  #field = document.getElementById("key");
  #asking = null;

  constructor() {
    document.getElementById("key-cancel").addEventListener("click", () => this.#dialog.close());
    document.getElementById("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#dialog.close(this.#field.value);
    });
  }

  /**
   * @param {string} reason why a key is needed
   * @returns {Promise<?string>} the key, or null if the user closes the dialog
   */
  ask(reason) {
    this.#asking ??= this.#open(reason).finally(() => {
      this.#asking = null;
    });
    return this.#asking;
  }

  #open(reason) {
    document.getElementById("key-reason").textContent = reason;
    document.getElementById("change-key").hidden = false;
    this.#field.value = this.#dialog.returnValue = "";
    this.#dialog.showModal();
    return new Promise((resolve) => {
      this.#dialog.addEventListener("close", () => resolve(this.#dialog.returnValue || null), { once: true });
    });
  }
}
