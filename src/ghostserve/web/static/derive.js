// What must have happened between two status documents: the timeline of a server without an event log. Pure.

const STATES = {
  serving: ["server_serving", "the server serves"], recovering: ["recovery_begun", "a recovery has begun"],
  failed: ["server_gave_up", "the server gave up"], starting: ["server_started", "the server starts"],
};

function* ranks(before, after) {
  for (const rank of after.ranks) {
    const was = before.ranks.find((other) => other.rank === rank.rank);
    if (!was) continue;
    if (was.state === "alive" && rank.state === "lost") {
      yield {kind: "rank_lost", rank: rank.rank, text: `rank ${rank.rank}, pid ${was.pid}, is lost`};
    }
    if (was.pid !== rank.pid) {
      yield {kind: "rank_taken", rank: rank.rank, text: `pid ${rank.pid} is rank ${rank.rank} now`};
    }
    if (was.health !== rank.health && rank.health === "slow") {
      yield {kind: "rank_slow", rank: rank.rank, text: `rank ${rank.rank} is slow: ${rank.health_reason}`};
    }
    if (was.health === "slow" && rank.health === "alive") {
      yield {kind: "rank_not_slow", rank: rank.rank, text: `rank ${rank.rank} is no longer slow`};
    }
  }
}

function* helpers(before, after) {
  if (before.keeper?.pid !== after.keeper?.pid) {
    const pid = after.keeper?.pid;
    yield pid ? {kind: "keeper_restarted", text: `the keeper is pid ${pid} now`} : {kind: "keeper_died", text: "the keeper has ended"};
  }
  const ready = (status) => (status.standbys || []).filter((one) => one.state === "ready").map((one) => one.pid);
  for (const pid of ready(after)) {
    if (!ready(before).includes(pid)) yield {kind: "standby_ready", text: `standby ${pid} is ready`};
  }
  const bare = [before, after].map((status) => status.shadow?.unprotected_blocks || 0);
  if (!bare[0] && bare[1]) yield {kind: "protection_lost", text: `${bare[1]} blocks are unprotected`};
  if (bare[0] && !bare[1]) yield {kind: "protection_regained", text: "everything is protected again"};
}

function* recoveries(before, after) {
  for (const report of after.recoveries || []) {
    if ((before.recoveries || []).some((other) => other.epoch === report.epoch)) continue;
    const who = `rank ${report.lost_ranks.join(", ")}`;
    yield report.ok
      ? {kind: "recovery_ended", text: `${who} came back by ${report.path} in ${report.total_ms.toFixed(0)} ms: ${report.reason}`}
      : {kind: "phase_failed", text: `${who} did not come back: ${report.reason}`};
  }
}

// Events from `before` to `after`, oldest first: {kind, rank?, text}. None without a `before`.
export function derive(before, after) {
  if (!before) return [];
  const found = [...ranks(before, after), ...recoveries(before, after), ...helpers(before, after)];
  if (before.state !== after.state && STATES[after.state]) {
    const [kind, text] = STATES[after.state], event = {kind, text};
    if (after.state === "recovering") found.unshift(event);
    else found.push(event);
  }
  return found;
}
