// One greedy answer as it streams, and the same once more, unfailed, to compare with. Knows nothing of how it looks.

import {ask, headers, sentenceOf} from "./server.js";
import {readEvents} from "./events.js";
import {compare} from "./oracle.js";

const SILENCE_MS = 180000, REFERENCE_TRIES = 3;

let model = null;

// Another server may serve another model by the same address.
export const forgetModel = () => { model = null; };

// Stream one answer; `onPiece(ids, text, atMs)` for each chunk. Throws when it breaks, is cut short or stopped. Each has
// a cache salt of its own, so that no answer feeds on another's prefix cache.
export async function complete({prompt, tokens, signal, onPiece}) {
  model ??= (await ask("v1/models")).data[0].id;
  const answer = await fetch("v1/completions", {
    method: "POST", signal, headers: headers({"Content-Type": "application/json"}),
    body: JSON.stringify({
      prompt, max_tokens: tokens, model, temperature: 0, stream: true, ignore_eos: true, return_token_ids: true,
      cache_salt: crypto.getRandomValues(new Uint32Array(4)).join("-"),
    }),
  });
  if (!answer.ok) throw new Error(await sentenceOf(answer));
  for await (const data of readEvents(answer.body, SILENCE_MS)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new Error(event.error.message || "the server reported an error");
    for (const choice of event.choices || []) onPiece(choice.token_ids || [], choice.text || "", performance.now());
  }
  throw new Error("the stream ended early");
}

// The longest wait for a token that ended after `sinceMs` and began before `untilMs`: what a reader had to sit through.
export function longestGap(atMs, sinceMs, untilMs = Infinity) {
  return atMs.slice(1).reduce((longest, at, i) => at > sinceMs && atMs[i] < untilMs ? Math.max(longest, at - atMs[i]) : longest, 0);
}

// One run: what arrived when, and who was struck meanwhile.
export class Run {
  constructor(request, status) {
    this.request = request;
    this.recoveriesBefore = status.recoveries_total;
    this.ids = [];
    this.atMs = [];
    this.strikes = [];
    this.path = null;  // of the recovery in it
    this.recoveredMs = Infinity;  // when it was over; a stall after that has other causes
    this.abort = new AbortController();
  }

  // A fault was sent from this page. Anything else that kills a worker may have done so at any time.
  struck(rank, how) {
    const strike = {rank, how, atMs: performance.now(), atToken: this.ids.length};
    this.strikes.push(strike);
    return strike;
  }

  take(ids, atMs) {
    for (const id of ids) { this.ids.push(id); this.atMs.push(atMs); }
  }

  outageMs() {
    return longestGap(this.atMs, this.strikes[0]?.atMs ?? 0, this.recoveredMs);
  }

  // The same request again. It counts only if nothing failed while it ran; null if that did not happen in all tries.
  async unfailed(onProgress) {
    for (let i = 0; i < REFERENCE_TRIES; i++) {
      const ids = [], before = await ask("ghostserve/status");
      await complete({
        ...this.request, signal: this.abort.signal,
        onPiece: (more) => { ids.push(...more); onProgress(ids.length); },
      });
      const after = await ask("ghostserve/status");
      const calm = before.state === "serving" && after.state === "serving";
      if (calm && before.recoveries_total === after.recoveries_total) return ids;
    }
    return null;
  }

  // What `compare` says, and how many tokens there were to compare with; null where there was no unfailed run.
  async verdict(onProgress) {
    const reference = await this.unfailed(onProgress);
    return reference && {...compare(reference, this.ids), tokens: reference.length};
  }
}
