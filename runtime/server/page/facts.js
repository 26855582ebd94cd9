/** The engine's facts, from /info. */

import { copyFrom } from "./clipboard.js";

/** The rows to show of /info. A fact that an engine lacks is left out. */
function rowsOf({ model, version, engine }) {
  const { scheme, ...phrases } = engine.quantization;
  const rows = [
    ["Model", model],
    ["Engine", engine.name !== model && engine.name],
    ["Size", engine.parameters && `${large(engine.parameters)} parameters`],
    ["Target", engine.target],
    ["Kernels", engine.kernels],
    ["Ranks", engine.ranks],
    ["Context", engine.max_context && `${engine.max_context.toLocaleString("en")} tokens`],
    ["Vocabulary", engine.vocab_size && `${engine.vocab_size.toLocaleString("en")} tokens`],
    ["Quantization", scheme],
    ...Object.entries(phrases).map(([key, phrase]) => [nameOf(key), phrase]),
    ["Version", version],
    ["Digest", engine.digest],
  ];
  return rows.filter(([, value]) => value);
}

/** The manifest's name of a phrase, such as "kv_cache", as a title. */
const nameOf = (key) => (key[0].toUpperCase() + key.slice(1)).replace("Kv_", "KV ");

/** A count of millions or billions in three digits. */
function large(count) {
  const [unit, name] = count >= 1e9 ? [1e9, "billion"] : [1e6, "million"];
  return `${(count / unit).toPrecision(3)} ${name}`;
}

/** Show the facts, a button that copies the digest, and the link to the build's report if there is one. */
export function showFacts(info, api, announce) {
  const cells = rowsOf(info).flatMap(([name, value]) => [makeCell("dt", name), makeCell("dd", value)]);
  document.getElementById("facts").replaceChildren(...cells);
  const copy = document.getElementById("copy-digest");
  copy.hidden = !info.engine.digest;
  copy.onclick = () => copyFrom(copy, info.engine.digest, announce);
  const report = document.getElementById("report");
  report.hidden = !info.report;
  if (!info.report) return;
  const path = info.report.replace(/^\//, ""); // relative, as all paths of the page
  report.href = path;
  report.onclick = (event) => {
    if (!api.hasKey) return;
    event.preventDefault();
    api.download(path, "report.html").catch((error) => announce(error.message));
  };
}

function makeCell(name, text) {
  const cell = document.createElement(name);
  cell.textContent = text;
  return cell;
}
