/** Text of a model, shown as text nodes only: paragraphs as they are, and blocks between ``` as code. */

const FENCE = /^```([^\n`]*)(?:\n|$)/m;
const FENCE_END = /^```[ \t]*(?:\n|$)/m;

/**
 * Divide a text, which may still grow, into blocks.
 * @param {string} text
 * @returns {{kind: "prose" | "code", text: string}[]}
 */
export function blocksOf(text) {
  const blocks = [];
  for (let rest = text; rest; ) {
    const opening = FENCE.exec(rest);
    const prose = (opening ? rest.slice(0, opening.index) : rest).trim();
    if (prose) blocks.push({ kind: "prose", text: prose });
    if (!opening) break;
    rest = rest.slice(opening.index + opening[0].length);
    const closing = FENCE_END.exec(rest);
    blocks.push({ kind: "code", text: (closing ? rest.slice(0, closing.index) : rest).replace(/\n$/, "") });
    rest = closing ? rest.slice(closing.index + closing[0].length) : "";
  }
  return blocks;
}

/** Show a text that has grown. Blocks that are complete are left alone, so that a selection in them stays. */
export function showText(element, text) {
  const blocks = blocksOf(text);
  blocks.forEach((block, index) => {
    let child = element.children[index];
    if (child?.dataset.kind !== block.kind) {
      const made = makeBlock(block.kind);
      if (child) child.replaceWith(made);
      else element.append(made);
      child = made;
    }
    growText(child.querySelector("code") ?? child, block.text);
  });
  while (element.children.length > blocks.length) element.lastElementChild.remove();
}

function makeBlock(kind) {
  const block = document.createElement(kind === "code" ? "pre" : "p");
  block.dataset.kind = kind;
  if (kind === "code") {
    block.tabIndex = 0; // long lines scroll, by the keyboard too
    block.append(document.createElement("code"));
  }
  return block;
}

function growText(element, text) {
  const node = element.firstChild;
  if (node && text.startsWith(node.data)) node.appendData(text.slice(node.data.length));
  else element.textContent = text;
}
