// The page: takes the live status and hands it to the views; runs answers, strikes workers, and has them judged.

import {$, enable, isEnabled, say, setText} from "./dom.js";
import {count, duration} from "./format.js";
import {AdminKeyWanted, KeyWanted, ask, inject, useAdminKey, useKey} from "./server.js";
import {follow} from "./events.js";
import {Run, complete, forgetModel} from "./answer.js";
import {append, clear, markDifferent, markStruck, showProgress} from "./answer_view.js";
import {measureRecompute, recalled, remember, startRestart} from "./measure.js";
import {opening, showCosts, showReport, tell, tellVerdict} from "./outcome.js";
import {lostSight, note, noteUnlogged, showTimeline} from "./timeline.js";
import {showShadow} from "./shadow.js";
import {showWorkers} from "./workers.js";

const TONES = {serving: "good", starting: "wait", recovering: "wait", failed: "bad"};
const DEEDS = {crash: "was killed (SIGKILL)", hang: "was stopped (SIGSTOP)", slow: "is slowed down from the next step on",
               corrupt: "has bits of its KV flipped in the next step"};

let status = null, run = null, struckRun = null, running = false, streaming = false, measuring = false, sawStandby = false, heldUp = false;
let refused = null;  // who was in focus when a fault was refused

// -- the status ---------------------------------------------------------------------------------------------------

function showHeader() {
  say($("state"), status.state + (status.phase ? `: ${status.phase}` : ""), TONES[status.state]);
  setText($("model"), `${status.model} · ${status.dtype} · ${count(status.tensor_parallel_size, "worker")} · epoch ${status.epoch}`);
  setText($("versions"), `ghostserve ${status.version} · vLLM ${status.vllm} · torch ${status.torch}`);
  document.body.dataset.state = status.state;
}

// What a recovery has done while an answer streams, or while nothing is asked for. The comparison has its own words.
function tellRecovery(before) {
  if (status.state === "failed") return tell(`the server gave up: ${status.failure ?? "see its log"}`, "bad");
  if (streaming) {
    const over = status.state !== "recovering" && status.recoveries_total > run.recoveriesBefore;
    run.recoveredMs = !over ? Infinity : Math.min(run.recoveredMs, performance.now());
    if (status.state === "recovering") tell("a worker is lost · recovering…", "wait");
    else if (over && run.outageMs()) {
      tell(`${opening(run, 1)} · the answer goes on, and is compared at its end`, "wait");
    }
  } else if (!run && !measuring && before && status.recoveries_total > before.recoveries_total && status.last_recovery?.ok) {
    tell(`recovered in ${duration(status.last_recovery.total_ms)} while nothing was asked for`, "good");
  }
}

function showCostsNow() {
  const found = recalled(status), restart = status.restart ?? {state: "none"};
  const last = struckRun?.outageMs() || status.recoveries?.findLast((one) => one.path === "rebuild")?.total_ms || null;
  const soFar = restart.state === "running" ? `starting, ${restart.elapsed_s.toFixed(0)} s so far` : restart.reason;
  showCosts([
    {name: struckRun?.path === "recompute" ? "this loss, recomputed" : "rebuilt in place", ms: last, note: "no loss yet"},
    {name: found ? `recomputed at token ${found.tokens}` : "recomputed", ms: found?.ms ?? null, note: ""},
    {name: "server restarted", ms: restart.state === "done" ? restart.seconds * 1000 : null, note: soFar},
  ]);
  const busy = measuring || running || restart.state === "running";
  $("measure").hidden = !status.fault_injection;
  enable($("measure"), !busy && struckRun?.strikes.length);
  $("measure-note").hidden = measuring || Boolean(struckRun);
}

function show(next) {
  const before = status;
  if (before && before.ranks.every((rank, i) => rank.start_time !== next.ranks[i]?.start_time)) forgetModel();
  status = next;
  if (!before && status.fault_injection) tell("Stream an answer, and kill a worker while it runs: the answer goes on.", "");
  sawStandby ||= Boolean(status.standbys?.some((one) => one.state === "ready"));
  $("key-form").hidden = true;
  showHeader();
  showWorkers(status, strike);
  showShadow(status);
  showReport(status.last_recovery);
  showTimeline(status);
  showCostsNow();
  tellRecovery(before);
  $("length").max = Math.max(8, status.max_model_len - 128);
  if (!before && Number($("length").value) > $("length").max) $("length").value = $("length").max;
  enable($("go"), !running && !measuring);
}

function connection(state, sentence) {
  if (state === "open") {
    offerPrompts();
    if (heldUp) { heldUp = false; setText($("notice"), "connected again"); note("server_serving", "the server answers again"); }
    return;
  }
  document.body.dataset.state = state;
  if (state === "key") {
    say($("state"), "wants a key", "wait");
    if ($("key-form").hidden) { $("key-form").hidden = false; $("key").focus(); }
  } else {
    say($("state"), state === "refused" ? sentence : "reconnecting…", "bad");
    if (status && !heldUp) { setText($("notice"), "the server does not answer; reconnecting"); note("silence", "the server does not answer"); }
    heldUp = Boolean(status);
    lostSight();
  }
}

// -- an answer ----------------------------------------------------------------------------------------------------

async function streamAndJudge() {
  const nodes = [], {tokens} = run.request, startMs = performance.now();
  clear();
  tell(status?.fault_injection ? "streaming · kill a worker now" : "streaming", "");
  await complete({...run.request, signal: run.abort.signal, onPiece: (ids, text, atMs) => {
    run.take(ids, atMs);
    const node = document.createTextNode(text);
    for (const _ of ids) nodes.push(node);
    append(node);
    showProgress("answer", run.ids.length, tokens, startMs);
  }});
  const after = await ask("ghostserve/status"), recoveries = after.recoveries_total - run.recoveriesBefore;
  streaming = false;
  if (recoveries) {
    struckRun = run;
    run.path = after.last_recovery.path;
  }
  const start = opening(run, recoveries), againMs = performance.now();
  tell(`${start} · comparing with an unfailed run…`, "wait");
  const verdict = await run.verdict((seen) => showProgress("unfailed run", seen, tokens, againMs));
  tellVerdict(start, verdict);
  if (verdict && !verdict.identical) markDifferent(nodes, verdict.first);
}

async function start() {
  running = true;
  enable($("go"), false);
  enable($("stop"), true);
  try {
    run = new Run({prompt: $("prompt").value, tokens: Number($("length").value)}, await ask("ghostserve/status"));
    streaming = true;
    await streamAndJudge();
  } catch (error) {
    if (run?.abort.signal.aborted) tell("stopped; nothing was compared", "");
    else tell(`the answer broke: ${error.message}`, "bad");
  }
  run = null;
  running = streaming = false;
  enable($("go"), true);
  enable($("stop"), false);
}

// -- faults -------------------------------------------------------------------------------------------------------

// Why a fault was refused; where it is for want of the admin key, the page asks for it.
function refusal(error) {
  if (!(error instanceof AdminKeyWanted)) return error.message;
  if ($("admin-form").hidden) refused = document.activeElement;
  $("admin-form").hidden = false;
  $("admin-key").focus();
  return `${error.message}; enter ${error.offered ? "the right one" : "it"} under "Admin key", then try again`;
}

async function strike(rank, how) {
  if (status.ranks[rank]?.state !== "alive") return setText($("notice"), `rank ${rank} is not alive; wait until it is replaced`);
  const mark = streaming ? run.struck(rank, how) : null;
  const body = how === "slow" ? {rank, how, factor: 5, steps: 100} : {rank, how};
  try {
    const {pid} = await inject("ghostserve/kill", body), late = run && !mark ? "; the answer had ended, and is compared once more" : "";
    const text = `rank ${rank}, pid ${pid}, ${DEEDS[how]}${late}`;
    setText($("notice"), text);
    noteUnlogged("fault_injected", text);
    if (mark) markStruck(`rank ${rank} ${how === "crash" ? "killed" : how}`);
  } catch (error) {
    if (mark) run?.strikes.splice(run.strikes.indexOf(mark), 1);
    setText($("notice"), `not done: ${refusal(error)}`);
  }
}

async function measure() {
  if (!isEnabled($("measure"))) return;
  const {request, strikes: [{rank, atToken}]} = struckRun, onProgress = (text) => setText($("measure-progress"), text);
  measuring = true;
  showCostsNow();
  try {
    const ms = await measureRecompute({...request, rank, atToken, withStandby: sawStandby, onProgress});
    remember(status, {ms, tokens: atToken});
    onProgress("recompute is measured; a second server starts");
    await startRestart();
    onProgress("measured by starting a second server with the same flags, up to its first token");
  } catch (error) {
    onProgress(`not measured: ${refusal(error)}`);
  }
  measuring = false;
  showCostsNow();
}

// -- wiring -------------------------------------------------------------------------------------------------------

// Again after a key was entered: without it they are refused. What was typed meanwhile stays.
async function offerPrompts() {
  if ($("offered").options.length) return;
  try {
    const prompts = await ask("ui/prompts.json");
    $("offered").replaceChildren(...prompts.map(({name, prompt}) => new Option(name, prompt)));
    $("prompt").value ||= prompts[0].prompt;
  } catch (error) {
    if (!(error instanceof KeyWanted)) setText($("notice"), `no prompts: ${error.message}`);
  }
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (isEnabled($("go"))) start();
});
$("stop").addEventListener("click", () => run?.abort.abort());
$("measure").addEventListener("click", measure);
$("offered").addEventListener("change", () => { $("prompt").value = $("offered").value; });
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key").value);
  $("key").value = "";
});

$("admin-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useAdminKey($("admin-key").value);
  $("admin-key").value = "";
  $("admin-form").hidden = true;
  setText($("notice"), "the admin key will be sent with the next fault");
  refused.focus();  // where it can be tried again
});

follow("ghostserve/live", {onData: show, onState: connection});
