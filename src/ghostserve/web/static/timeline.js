// The newest events first. They come from the server's event log; from a server without one, or that does not answer,
// they are derived from what changed in its status.

import {$, make} from "./dom.js";
import {ask} from "./server.js";
import {derive} from "./derive.js";

const SHOWN_MAX = 200, EVERY_MS = 500, AT_ONCE = 100;
const BAD = new Set(["rank_lost", "rank_fenced", "rank_slow", "server_gave_up", "fault_injected", "request_failed", "phase_failed",
  "step_raised", "step_failed", "standby_died", "keeper_died", "keeper_given_up", "protection_lost", "scrub_finding", "silence"]);
const GOOD = new Set(["server_serving", "rank_taken", "rank_not_slow", "recovery_ended", "request_resumed", "standby_ready",
  "keeper_restarted", "protection_regained"]);

let after = null, logged = null, askedMs = -Infinity, asking = false, before = null;

const clock = (at) => at.toLocaleTimeString([], {hour12: false}) + "." + String(at.getMilliseconds()).padStart(3, "0");

function add({kind, text, data}, at) {
  const tone = BAD.has(kind) || data?.ok === false ? "bad" : GOOD.has(kind) ? "good" : "", list = $("events");
  const time = make("time", {text: clock(at), datetime: at.toISOString()});
  list.prepend(make("li", {class: tone, "data-kind": kind}, time, make("span", {text})));
  while (list.children.length > SHOWN_MAX) list.lastChild.remove();
  $("no-events").hidden = true;
}

// Something that only the page can know.
export const note = (kind, text) => add({kind, text}, new Date());

// Something that the event log would tell, too.
export function noteUnlogged(kind, text) {
  if (!logged) note(kind, text);
}

async function readLog() {
  asking = true;
  askedMs = performance.now();
  try {
    const place = after === null ? "" : `after=${after}&`;  // without one, the newest
    const answer = await ask(`ghostserve/events?${place}limit=${AT_ONCE}`);
    logged = true;
    if (after !== null && answer.next < after) after = null;  // another server, with a log of its own: asked again next time
    else {
      if (after !== null && answer.dropped) note("dropped", `${answer.dropped} events were overwritten before they could be shown`);
      for (const event of answer.events) add(event, new Date(event.at));
      after = answer.next;
    }
  } catch (error) {
    if (error.status === 404) logged = false;
  } finally {
    asking = false;
  }
}

// Called with each status document.
export function showTimeline(status) {
  if (logged === false) for (const event of derive(before, status)) add(event, new Date());
  else if (!asking && performance.now() - askedMs >= EVERY_MS) readLog();
  before = status;
}

// The server may be another one when it is back, with or without a log.
export function lostSight() {
  if (logged === false) logged = null;
}
