/** The page: puts its parts together. */

import { Api } from "./api.js";
import { Chat } from "./chat.js";
import { counted } from "./format.js";
import { showFacts } from "./facts.js";
import { KeyDialog } from "./key-dialog.js";
import { Monitor } from "./monitor.js";
import { setUpSheet, setUpTabs } from "./panel.js";
import { Parameters } from "./parameters.js";

const byId = (id) => document.getElementById(id);

let info = null;
const keyDialog = new KeyDialog();
const api = new Api(
  (reason) => keyDialog.ask(reason),
  () => monitor.restart(),
);
const parameters = new Parameters(byId("parameters-form"));
const monitor = new Monitor(api, showState);
const chat = new Chat({ api, parameters, model: () => info?.model, announce });

/** Let screen readers speak a text. */
function announce(text) {
  byId("announcer").textContent = text;
}

/** Say in the page's head how the server does. */
function showState(stats, error) {
  const state = error ? (error.status === 401 ? "locked" : "offline") : stats.running + stats.waiting > 0 ? "busy" : "ready";
  const texts = {
    locked: () => "API key needed",
    offline: () => error.message,
    busy: () => [`${stats.running} running`, stats.waiting > 0 && `${stats.waiting} waiting`].filter(Boolean).join(", "),
    ready: () => "Ready",
  };
  const status = byId("status");
  const text = texts[state]();
  if (status.dataset.state !== state && error) announce(text);
  status.dataset.state = state;
  status.textContent = text;
  if (stats && !info) loadInfo({ mayAsk: false });
}

async function loadInfo({ mayAsk }) {
  try {
    info = await api.getJson("info", { mayAsk });
  } catch (error) {
    showState(null, error);
    return;
  }
  byId("model").textContent = document.title = info.model;
  parameters.showDefaults(info.defaults);
  showFacts(info, api, announce);
}

function setUpControls() {
  byId("new-chat").addEventListener("click", () => chat.clear());
  byId("examples").addEventListener("click", ({ target }) => {
    if (target.closest("button")) chat.send(target.textContent);
  });
  byId("change-key").addEventListener("click", () => api.renewKey("Enter another key."));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.isComposing && !document.querySelector("dialog[open]")) chat.stop();
  });
}

async function start() {
  await loadInfo({ mayAsk: true });
  monitor.restart();
}

setUpTabs(() => monitor.draw());
setUpSheet(() => monitor.draw());
setUpControls();
start();
