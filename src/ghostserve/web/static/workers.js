// One card per rank, per standby, and for the keeper. Cards are kept, so that the focus stays where it is.

import {$, enable, fill, make, say, setText} from "./dom.js";
import {age, bytes, bytesOf, count} from "./format.js";

const TONES = {alive: "good", ready: "good", running: "good", starting: "wait", slow: "wait", suspect: "wait", lost: "bad", gone: "bad"};
const FAULTS = [
  ["hang", "Hang", "is stopped (SIGSTOP); found by its lack of progress"],
  ["slow", "Slow", "takes five times as long for 100 steps; shown, not replaced"],
  ["corrupt", "Corrupt", "bits of its live KV flip; found once nothing is served, so the answer may differ"],
];

const times = new Map();  // rank -> the last progress that had steps, and the time of a step

function menuOf(rank, strike) {
  const list = make("ul", {});
  for (const [how, name, what] of FAULTS) {
    const button = make("button", {type: "button", class: "fault", text: name, "aria-label": `${name} rank ${rank}`});
    button.addEventListener("click", () => strike(rank, how));
    list.append(make("li", {}, button, make("span", {class: "soft", text: what})));
  }
  const menu = make("details", {class: "menu"}, make("summary", {text: "More faults", "aria-label": `More faults for rank ${rank}`}), list);
  menu.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !menu.open) return;
    menu.open = false;
    menu.querySelector("summary").focus();
  });
  return menu;
}

function newCard(id, name) {
  const state = make("span", {class: "state"});
  const head = make("div", {class: "card-head"}, make("h3", {text: name}), state);
  return make("article", {id, class: "card", "aria-label": name}, head, make("dl", {}));
}

function cardOf(id, name, decorate) {
  let card = $(id);
  if (!card) {
    card = newCard(id, name);
    decorate?.(card);
    // Ranks first, then the standbys, the keeper last.
    const order = (element) => ["rank", "standby", "keeper"].indexOf(element.id.split("-")[0]);
    const next = [...$("workers").children].find((other) => order(other) > order(card));
    $("workers").insertBefore(card, next ?? null);
  }
  return card;
}

function show(card, state, pairs) {
  say(card.querySelector(".state"), state, TONES[state]);
  card.dataset.state = state;
  fill(card.querySelector("dl"), pairs);
}

// The mean of the steps since the last document that had any; null before the first.
function stepMs({rank, steps, in_steps_s: inStepsS}) {
  const last = times.get(rank);
  if (!last || steps < last.steps) times.set(rank, {steps, inStepsS, ms: null});
  else if (steps > last.steps) {
    times.set(rank, {steps, inStepsS, ms: 1000 * (inStepsS - last.inStepsS) / (steps - last.steps)});
  }
  return times.get(rank).ms;
}

function rankPairs(rank, progress, status) {
  const share = status.counters.kv_bytes_protected / status.ranks.length;
  const pairs = [["pid", String(rank.pid)], ["device", rank.device ?? "unknown"]];
  pairs.push(["KV protected", rank.kv_bytes ? bytesOf(share, rank.kv_bytes) : bytes(share)]);
  if (progress) {
    const idle = !status.counters.requests_open, ms = stepMs(progress);
    pairs.push(["last step", progress.age_s === null ? "none yet" : age(progress.age_s) + (idle ? " (idle)" : "")]);
    pairs.push(["step time", ms === null ? "not known yet" : `${ms.toFixed(1)} ms`]);
  }
  return pairs;
}

function showRank(rank, status, strike) {
  const id = `rank-${rank.rank}`;
  const card = cardOf(id, `rank ${rank.rank}`, (fresh) => {
    const kill = make("button", {type: "button", class: "kill", text: "Kill", "aria-label": `Kill rank ${rank.rank}`});
    kill.addEventListener("click", () => strike(rank.rank, "crash"));
    fresh.append(make("div", {class: "faults"}, kill, menuOf(rank.rank, strike)));
  });
  const state = rank.state === "alive" ? rank.health ?? "alive" : rank.state;
  const progress = status.progress?.find((one) => one.rank === rank.rank);
  show(card, state, rankPairs(rank, progress, status));
  card.title = rank.health_reason ?? "";
  card.querySelector(".faults").hidden = !status.fault_injection;
  for (const button of card.querySelectorAll("button")) enable(button, rank.state === "alive");
}

export function showWorkers(status, strike) {
  for (const rank of status.ranks) showRank(rank, status, strike);
  const standbys = status.standbys ?? [];
  standbys.forEach((standby, i) => {
    const memory = standby.memory_bytes ? bytes(standby.memory_bytes) : "not measured yet";
    show(cardOf(`standby-${i}`, standbys.length > 1 ? `standby ${i + 1}` : "standby"), standby.state,
      [["pid", String(standby.pid)], ["memory of its own", memory]]);
  });
  const keeper = status.keeper ?? {};
  show(cardOf("keeper", "keeper"), keeper.pid ? "running" : "gone", [
    ["pid", String(keeper.pid ?? "none")], ["restarts", String(keeper.restarts ?? 0)],
    ["encoded", bytes(status.counters.encode_bytes_total)],
  ]);
  const wanted = new Set(["keeper", ...status.ranks.map((rank) => `rank-${rank.rank}`), ...standbys.map((_, i) => `standby-${i}`)]);
  for (const card of [...$("workers").children]) if (!wanted.has(card.id)) card.remove();
  $("no-injection").hidden = status.fault_injection;
  setText($("worker-count"), `${count(status.ranks.length, "rank")} · ${count(standbys.length, "standby")}`);
}
