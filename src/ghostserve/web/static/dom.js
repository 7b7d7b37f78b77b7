// The few things that every view does with the document. Text is set as text, never as HTML.

export const $ = (id) => document.getElementById(id);

// An element with attributes and children; `class` and `text` are short for what one writes most.
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") element.textContent = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// Only what has changed is touched: a live region would be read again, and a selection be lost.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export const TONES = ["good", "bad", "wait", "soft"];

export function say(element, text, tone = "") {
  setText(element, text);
  for (const other of TONES) element.classList.toggle(other, other === tone);
}

// Not `disabled`: a button that is disabled drops the focus of who has just pressed it. Its handler has to look.
export const enable = (button, on) => button.setAttribute("aria-disabled", String(!on));

export const isEnabled = (button) => button.getAttribute("aria-disabled") !== "true";

// A list of names and values; rebuilt only when one of them has changed.
export function fill(list, pairs) {
  const wanted = JSON.stringify(pairs);
  if (list.dataset.shown === wanted) return;
  list.dataset.shown = wanted;
  list.replaceChildren(...pairs.map(([name, value]) =>
    make("div", {}, make("dt", {text: name}), make("dd", {text: value}))));
}
