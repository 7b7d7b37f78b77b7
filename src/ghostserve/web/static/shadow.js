// What is kept in host memory, by kind, and how much of the answers it covers.

import {$, fill, make, setText} from "./dom.js";
import {bytes, count} from "./format.js";

function showBar(parts, total) {
  const bar = $("memory-bar");
  for (const [kind, size] of parts) {
    const part = bar.querySelector(`[data-kind="${kind}"]`) ?? bar.appendChild(make("span", {"data-kind": kind}));
    part.style.width = `${100 * size / (total || 1)}%`;
    part.hidden = !size;
  }
}

// Tokens whose KV is kept, those whose is not, and those that have been computed and not been kept yet.
function showTokens(status) {
  const {shadow, counters} = status;
  const bare = counters.unprotected_tokens ?? shadow.unprotected_blocks * status.block_size;
  const lag = counters.shadow_lag_tokens;
  fill($("tokens"), [
    ["tokens protected", String(counters.protected_tokens)],
    [counters.unprotected_tokens === undefined && bare ? "unprotected, at most" : "unprotected", String(bare)],
    ["lag", lag === undefined ? "at most one step" : count(lag, "token")],
  ]);
}

export function showShadow(status) {
  const {shadow} = status;
  const used = shadow.parity_bytes + shadow.mirror_bytes, free = Math.max(0, shadow.budget_bytes - used);
  showBar([["parity", shadow.parity_bytes], ["mirrors", shadow.mirror_bytes], ["free", free]], shadow.budget_bytes);
  fill($("memory"), [
    ["parity", bytes(shadow.parity_bytes)], ["mirrors", bytes(shadow.mirror_bytes)], ["free", bytes(free)],
    ["budget", bytes(shadow.budget_bytes)],
    ...(status.weights_bytes ? [["weights", `${bytes(status.weights_bytes)}, in the ranks`]] : []),
  ]);
  setText($("memory-note"), `${shadow.protection} · ${count(shadow.coded_blocks, "block")} coded, ` +
    `${shadow.backlog_blocks} waiting · bound ${bytes(shadow.bound_bytes)} ${shadow.bound_holds ? "holds" : "EXCEEDED"}`);
  showTokens(status);
}
