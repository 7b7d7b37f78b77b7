"""One sentence per event, for people: numbers with their units. Pure."""

from __future__ import annotations

from functools import singledispatch

from ghostserve.events import kinds
from ghostserve.events.kinds import Event

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def text_of(event: Event) -> str:
    """The sentence, without a time, on one line; what would steer a terminal is left out of it."""
    return "".join(character if character.isprintable() else " " for character in _sentence(event))


@singledispatch
def _sentence(event: Event) -> str:
    raise NotImplementedError(type(event).__name__)  # a test asks for each kind


def count(number: int, noun: str) -> str:
    """`2 tokens`, `1 token`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def milliseconds(ms: float) -> str:
    """Whole milliseconds, tenths below ten, seconds from ten seconds on."""
    if ms >= 10_000:
        return f"{ms / 1e3:.1f} s"
    return f"{ms:.1f} ms" if ms < 10 else f"{ms:.0f} ms"


def _bytes(number: float) -> str:
    for unit in _UNITS[:-1]:
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} {_UNITS[-1]}"


def ranks_text(ranks: list[int]) -> str:
    """`rank 1`, `ranks 0, 1`."""
    return f"rank{'' if len(ranks) == 1 else 's'} {', '.join(map(str, ranks))}"


# -- the server ------------------------------------------------------------------------------------------------


@_sentence.register
def _(event: kinds.ServerStarted) -> str:
    return f"ghostserve {event.version} starts {event.model} on {count(event.ranks, 'worker')} (process {event.pid})"


@_sentence.register
def _(event: kinds.ServerServing) -> str:
    return f"the server serves, {event.start_s:.1f} s after its start"


@_sentence.register
def _(event: kinds.ServerDraining) -> str:
    return f"the server was told to end; open requests have {event.timeout_s:g} s"


@_sentence.register
def _(event: kinds.ServerStopped) -> str:
    return f"the server ended with exit status {event.exit_status}{event.reason and ': '}{event.reason}"


@_sentence.register
def _(event: kinds.ServerGaveUp) -> str:
    return f"the server gives up: {event.reason}"


@_sentence.register
def _(event: kinds.FaultInjected) -> str:
    whom = "" if event.rank is None else f" on rank {event.rank}"
    process = "" if event.pid is None else f" (process {event.pid})"
    return f"fault {event.how} was asked for{whom}{process}, to strike {event.strikes}"


# -- requests --------------------------------------------------------------------------------------------------


@_sentence.register
def _(event: kinds.RequestAdmitted) -> str:
    return (
        f"request {event.request} was admitted: {count(event.prompt_tokens, 'prompt token')}, "
        f"at most {count(event.max_tokens, 'token')} to come"
    )


@_sentence.register
def _(event: kinds.RequestFinished) -> str:
    shown, took = count(event.output_tokens, "token"), milliseconds(event.total_ms)
    return f"request {event.request} finished ({event.reason}) after {shown} in {took}"


@_sentence.register
def _(event: kinds.RequestAborted) -> str:
    shown, took = count(event.output_tokens, "token"), milliseconds(event.total_ms)
    return f"request {event.request} was aborted after {shown} in {took}"


@_sentence.register
def _(event: kinds.RequestFailed) -> str:
    shown, took = count(event.output_tokens, "token"), milliseconds(event.total_ms)
    return f"request {event.request} ended with an error after {shown} in {took}"


@_sentence.register
def _(event: kinds.RequestRecomputed) -> str:
    return f"request {event.request} computes {count(event.tokens, 'token')} again: {event.reason}"


@_sentence.register
def _(event: kinds.RequestResumed) -> str:
    shown = count(event.output_tokens, "token")
    return (
        f"request {event.request} goes on after {shown}; the recovery took {milliseconds(event.recovery_ms)}"
    )


# -- losses and recoveries -------------------------------------------------------------------------------------


@_sentence.register
def _(event: kinds.RankLost) -> str:
    return f"rank {event.rank} (process {event.pid}) is lost ({event.cause}): {event.reason}"


@_sentence.register
def _(event: kinds.RankFenced) -> str:
    return f"rank {event.rank} is fenced: SIGKILL to process {event.pid}"


@_sentence.register
def _(event: kinds.RankTaken) -> str:
    who = "standby" if event.standby else "new process"
    return f"{who} {event.pid} takes rank {event.rank}"


@_sentence.register
def _(event: kinds.RankSlow) -> str:
    return f"rank {event.rank} is slow: {event.reason}"


@_sentence.register
def _(event: kinds.RankNotSlow) -> str:
    return f"rank {event.rank} is no longer slow"


@_sentence.register
def _(event: kinds.EpochRaised) -> str:
    return f"epoch {event.epoch} begins: {event.reason}"


@_sentence.register
def _(event: kinds.PhaseBegun) -> str:
    return f"phase {event.phase} begins"


@_sentence.register
def _(event: kinds.PhaseEnded) -> str:
    return f"phase {event.phase} took {milliseconds(event.ms)}"


@_sentence.register
def _(event: kinds.PhaseFailed) -> str:
    return f"phase {event.phase} failed: {event.reason}"


@_sentence.register
def _(event: kinds.RecoveryEnded) -> str:
    what = ranks_text(event.ranks) if event.ranks else "a step"
    took = milliseconds(event.total_ms)
    if not event.ok:
        return f"{what} not recovered after {took}: {event.reason}"
    blocks = (
        f"{count(event.kv_blocks_from_parity, 'block')} from parity, {event.kv_blocks_from_mirrors} from mirrors "
        f"({_bytes(event.kv_bytes_rebuilt)})"
    )
    again = (
        f"{count(event.tokens_recomputed, 'token')} recomputed"
        if event.tokens_recomputed
        else "no token recomputed"
    )
    resumed = f"{count(event.requests_resumed, 'request')} resumed"
    return f"{what} recovered by {event.path} in {took}: {blocks}, {again}, {resumed}"


@_sentence.register
def _(event: kinds.StepRaised) -> str:
    return f"a step raised an error: {event.reason}"


@_sentence.register
def _(event: kinds.StepFailed) -> str:
    return f"a step is given up, {count(event.requests, 'request')} get an error: {event.reason}"


# -- what stands behind ----------------------------------------------------------------------------------------


@_sentence.register
def _(event: kinds.StandbyReady) -> str:
    return f"standby {event.pid} is ready, {milliseconds(event.start_ms)} after its start"


@_sentence.register
def _(event: kinds.StandbyDied) -> str:
    return f"standby {event.pid} {event.reason}"


@_sentence.register
def _(event: kinds.KeeperDied) -> str:
    return f"keeper {event.pid} ended with status {event.status}"


@_sentence.register
def _(event: kinds.KeeperRestarted) -> str:
    return f"keeper {event.pid} takes over: {count(event.restarts, 'restart')} so far"


@_sentence.register
def _(event: kinds.KeeperGivenUp) -> str:
    return f"the keeper died {event.deaths} times in {event.window_s:g} s: no parity for as long"


@_sentence.register
def _(event: kinds.ProtectionLost) -> str:
    return f"protection is off until nothing is served: {event.reason}"


@_sentence.register
def _(event: kinds.ProtectionRegained) -> str:
    return "protection is on again for what comes from here on"


@_sentence.register
def _(event: kinds.KvUnprotected) -> str:
    return f"{count(event.blocks, 'KV block')} would be computed again after a loss: {event.reason}"


@_sentence.register
def _(_event: kinds.KvProtected) -> str:
    return "all KV is protected again"


@_sentence.register
def _(event: kinds.ScrubFinding) -> str:
    where = f"parity shard {event.shard}" if event.rank is None else f"rank {event.rank}"
    layers = f" ({', '.join(event.layers)})" if event.layers else ""
    outcome = "was repaired" if event.repaired else "could not be repaired"
    why = f": {event.reason}" if event.reason else ""
    return (
        f"{event.part} of block {event.block}, {where}{layers}, differs from its checksum and {outcome} "
        f"({event.remedy}){why}"
    )
