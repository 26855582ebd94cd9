/** Copying. Pages that came over plain HTTP have no `navigator.clipboard`, and a server is often reached that way. */

/**
 * Copy a text.
 * @returns {Promise<boolean>} whether it was copied
 */
export async function copyText(text) {
  if (!navigator.clipboard) return copySelected(text);
  return navigator.clipboard.writeText(text).then(
    () => true,
    () => copySelected(text),
  );
}

function copySelected(text) {
  const focused = document.activeElement;
  const field = document.createElement("textarea");
  field.className = "hidden-text";
  field.value = text;
  document.body.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  focused?.focus();
  return copied;
}

/** Copy a text and say so on the button for a moment, and to screen readers. */
export async function copyFrom(button, text, announce) {
  const copied = await copyText(text);
  announce(copied ? "Copied" : "The browser did not allow copying");
  button.dataset.copied = copied ? "yes" : "no";
  setTimeout(() => delete button.dataset.copied, 1500);
}
