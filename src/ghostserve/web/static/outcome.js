// What came of the last failure: one line, where its time went, and what else it would have cost.

import {$, make, say, setText} from "./dom.js";
import {bytes, count, duration} from "./format.js";

const PHASES = {
  detect: "the loss is noticed", fence: "the lost process is killed for good", leave: "survivors leave the broken group",
  spawn: "a process takes the rank", regroup: "groups are formed anew", weights: "the newcomer has its weights",
  state: "requests are as before the step", kv: "the lost KV is back", retry: "the interrupted step runs again",
};

// The one live region that tells how it went.
export const tell = (text, tone) => say($("outcome"), text, tone);

// How a run went, up to the comparison: "recovered in 512 ms".
export function opening(run, recoveries) {
  if (!recoveries && run.strikes.some(({how}) => how === "crash" || how === "hang")) return "the fault came after the last token: ask for more tokens";
  if (!recoveries) return run.strikes.length ? "no worker had to be replaced" : "nobody failed while it streamed";
  const ms = run.outageMs();
  return ms ? `recovered in ${duration(ms)}` : "recovered after the last token";
}

export function tellVerdict(start, verdict) {
  if (verdict === null) return tell(`${start} · not compared: workers failed in the unfailed run, too`, "bad");
  if (!verdict.tokens) return tell(`${start} · both answers are empty, nothing was compared`, "bad");
  const {identical, lost, duplicated, changed, first} = verdict;
  const counts = `${start} · ${lost} lost · ${duplicated} duplicated`;
  if (identical) return tell(`${counts} · identical ✓`, "good");
  return tell(`${counts} · ${changed} changed · NOT identical ✗ (from token ${first} on)`, "bad");
}

// Phases as a waterfall: each begins where the one before has ended.
export function showReport(report) {
  const list = $("phases");
  if (!report || list.dataset.epoch === String(report.epoch)) return;
  list.dataset.epoch = report.epoch;
  const entries = Object.entries(report.phases_ms), total = entries.reduce((sum, [, ms]) => sum + ms, 0) || 1;
  let beganMs = 0;
  list.replaceChildren(...entries.map(([phase, ms]) => {
    const bar = make("span", {class: "span", "aria-hidden": "true"}, make("span", {}));
    bar.firstChild.style.marginInlineStart = `${100 * beganMs / total}%`;
    bar.firstChild.style.width = `${100 * ms / total}%`;
    beganMs += ms;
    return make("li", {title: PHASES[phase] ?? ""},
      make("span", {class: "name", text: phase}), bar, make("span", {class: "value", text: `${ms.toFixed(1)} ms`}));
  }));
  const who = `rank ${report.lost_ranks.join(", ")} (pid ${report.lost_pids.join(", ")})`;
  const how = report.ok ? `came back by ${report.path} in ${duration(report.total_ms)}` : "did not come back";
  const rebuilt = `${count(report.kv_blocks_from_parity, "block")} from parity, ${report.kv_blocks_from_mirrors} from mirrors ` +
    `(${bytes(report.kv_bytes_rebuilt)}) · ${count(report.tokens_recomputed, "token")} recomputed`;
  setText($("report"), `${who} ${how}: ${report.reason} · ${rebuilt}`);
  $("outcome-panel").hidden = false;
}

// What the same loss costs in other ways: [{name, ms, note}], `ms` null where it was not measured.
export function showCosts(costs) {
  const list = $("costs"), wanted = JSON.stringify(costs);
  if (list.dataset.shown === wanted) return;
  list.dataset.shown = wanted;
  const longest = Math.max(1, ...costs.map(({ms}) => ms ?? 0));
  list.replaceChildren(...costs.map(({name, ms, note}) => {
    const bar = make("span", {class: "span", "aria-hidden": "true"}, make("span", {}));
    bar.firstChild.style.width = `${100 * (ms ?? 0) / longest}%`;
    const value = make("span", {class: "value", text: ms === null ? note || "not measured" : duration(ms)});
    return make("li", {class: ms === null ? "unmeasured" : ""}, make("span", {class: "name", text: name}), bar, value);
  }));
}
