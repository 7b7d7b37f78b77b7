// What the other two answers to a loss cost on this machine: the same loss recomputed instead of rebuilt, and a server
// started anew. The first is measured from here, the second by the server.

import {ask, inject} from "./server.js";
import {complete, longestGap} from "./answer.js";

// A kill takes a while to arrive, and the stream must not have ended by then.
const TOKENS_AFTER = 400, STANDBY_MS = 30000, SETTLE_MS = 60000, POLL_MS = 250, RUN_MS = 300000;

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function waitFor(condition, limitMs) {
  for (const endMs = performance.now() + limitMs; performance.now() < endMs; await pause(POLL_MS)) {
    const status = await ask("ghostserve/status");
    if (condition(status)) return status;
  }
  return null;
}

// Milliseconds that a reader waits when rank `rank` is lost after `atToken` tokens and its requests are recomputed.
// `withStandby`: the loss that it is compared with had one, so this one gets one, too.
export async function measureRecompute({prompt, tokens, rank, atToken, withStandby, onProgress}) {
  const length = Math.min(tokens, atToken + TOKENS_AFTER);
  if (withStandby) {
    onProgress("waiting for a standby");
    await waitFor((status) => status.standbys?.some((one) => one.state === "ready"), STANDBY_MS);
  }
  const {recoveries_total: before} = await ask("ghostserve/status");
  await inject("ghostserve/switches", {force_recompute: true});
  try {
    const atMs = [];
    let killedMs = null, kill = null;
    await complete({
      prompt, tokens: length, signal: AbortSignal.timeout(RUN_MS),
      onPiece: (ids, text, now) => {
        for (const _ of ids) atMs.push(now);
        onProgress(`recompute: ${atMs.length} of ${length} tokens`);
        if (kill === null && atMs.length >= atToken) {
          killedMs = now;
          kill = inject("ghostserve/kill", {rank});
        }
      },
    });
    await kill;
    const ms = killedMs === null ? 0 : longestGap(atMs, killedMs);
    const status = await waitFor((now) => now.state === "serving" && now.recoveries_total > before, SETTLE_MS);
    if (!ms || !status) throw new Error("the answer had ended before the worker was killed");
    if (status.last_recovery.path !== "recompute") throw new Error("the loss was not recomputed");
    return ms;
  } finally {
    await inject("ghostserve/switches", {force_recompute: false});
  }
}

// The server starts another one of itself; how far it is comes with the live status.
export const startRestart = () => inject("ghostserve/measure-restart", {});

// -- what was measured is kept, by what was served -------------------------------------------------------------

const keyOf = (status) => `ghostserve-recompute ${status.model} ${status.dtype} ${status.tensor_parallel_size} ${status.version}`;

export function recalled(status) {
  try {
    return JSON.parse(localStorage.getItem(keyOf(status)));
  } catch {
    return null;
  }
}

export function remember(status, found) {
  try {
    localStorage.setItem(keyOf(status), JSON.stringify(found));
  } catch {
    // A browser that keeps nothing: measured again next time.
  }
}
