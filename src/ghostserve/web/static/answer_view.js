// The answer as it grows. What arrives is shown a few times per second: laying out the box for each token would take the
// processor that the workers compute on.

import {$, make, setText} from "./dom.js";
import {count} from "./format.js";

const PAINT_MS = 50, AT_END_PX = 40;

let waiting = [], progress, progressTimer;

export function clear() {
  waiting = [];
  $("answer").replaceChildren();
}

export function append(node) {
  if (waiting.push(node) === 1) setTimeout(paint, PAINT_MS);
}

// Show what has been appended; who reads the end of the answer goes along with it.
export function paint() {
  const box = $("answer"), atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < AT_END_PX;
  box.append(...waiting);
  waiting = [];
  if (atEnd) box.scrollTop = box.scrollHeight;
}

export const markStruck = (text) => append(make("span", {class: "struck", text: `✗ ${text}`}));

// `nodes`: the text node of each token.
export function markDifferent(nodes, first) {
  paint();
  for (const node of new Set(nodes.slice(first))) node.replaceWith(make("span", {class: "differs", text: node.data}));
}

// The last of a burst is shown, too: a stream that stands still has no next token to show it with.
export function showProgress(what, seen, total, startMs) {
  progress = {what, seen, total, startMs};
  if (seen >= total) return paintProgress();
  progressTimer ??= setTimeout(paintProgress, PAINT_MS);
}

function paintProgress() {
  clearTimeout(progressTimer);
  progressTimer = undefined;
  const {what, seen, total, startMs} = progress;
  const rate = seen / Math.max((performance.now() - startMs) / 1000, 0.001);
  $("progress").max = total;
  $("progress").value = seen;
  setText($("count"), `${what}: ${seen} of ${count(total, "token")} · ${rate.toFixed(0)} per second`);
}
