"""What encoding costs beside serving: the keeper's share of a CPU while 8 streams are answered, by parity shards.

.venv/bin/python bench/keeper.py [--shards 1 2 3] [--rounds N]
"""

from __future__ import annotations

import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import psutil
import results
import script
from script import say
from servers import MODEL_NAME, OURS_ON, Servers, shipped_prompts
from streams import rate_of, run_streams

from ghostserve.clock import monotonic_s
from ghostserve.testing.server import ServerProcess

STREAMS, TOKENS = 8, 256
FLAGS = ("--max-model-len", "4096", "--kv-cache-memory-bytes", str(64 << 20))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One round of streams. `keeper_percent`: of one CPU."""

    parity_shards: int
    tokens_per_s: float
    keeper_percent: float
    encoded_mib: float
    keeper_ms_per_mib: float


def measure(server: ServerProcess, *, shards: int, number: int) -> Sample:
    """One round, until all of it is encoded."""
    prompts = shipped_prompts()
    before = server.status()
    keeper = psutil.Process(before["keeper"]["pid"])
    began_s, used_s = monotonic_s(), _cpu_s(keeper)
    answers = run_streams(
        server.base_url,
        prompts=[prompts[index % len(prompts)] for index in range(STREAMS)],
        max_tokens=TOKENS,
        model=MODEL_NAME,
        cache_salt=f"keeper-{number}",
    )
    spent_s = monotonic_s() - began_s
    after = server.wait_status(
        lambda status: status["shadow"]["backlog_blocks"] == 0, timeout_s=30, what="everything encoded"
    )
    used_s = _cpu_s(keeper) - used_s
    encoded = (after["shadow"]["encode_bytes_total"] - before["shadow"]["encode_bytes_total"]) / 2**20
    return Sample(
        parity_shards=shards,
        tokens_per_s=rate_of(answers).tokens_per_s,
        keeper_percent=100 * used_s / spent_s,
        encoded_mib=encoded,
        keeper_ms_per_mib=1000 * used_s / encoded,
    )


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def markdown(samples: Sequence[Sample]) -> str:
    """Medians, a line for each number of parity shards."""
    rows = []
    for shards in sorted({sample.parity_shards for sample in samples}):
        mine = [sample for sample in samples if sample.parity_shards == shards]
        names = ("tokens_per_s", "keeper_percent", "encoded_mib", "keeper_ms_per_mib")
        rows.append(
            [str(shards), *(f"{statistics.median(getattr(s, name) for s in mine):.2f}" for name in names)]
        )
    header = (
        "parity shards",
        "tokens/s",
        "keeper, % of a CPU",
        "MiB encoded",
        "keeper, CPU ms per MiB of KV",
    )
    return f"{STREAMS} streams of {TOKENS} tokens, tensor parallel 2, medians.\n\n" + results.table(
        header, rows
    )


def main(argv: Sequence[str]) -> int:
    """Exit status 0, or the error's."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = script.new_parser(__doc__)
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2, 3], metavar="M")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(argv)
    about, samples = results.facts(), []
    for shards in arguments.shards:
        with Servers() as servers:
            say(f"starting with {shards} parity shards")
            server = servers.start(OURS_ON, *FLAGS, "--parity-shards", str(shards))
            for number in range(arguments.rounds + 1):
                sample = measure(server, shards=shards, number=number)
                samples += [sample] if number else []  # the first warms up
                say(f"{shards} parity shards, round {number}: {sample.keeper_percent:.1f} % of a CPU")
    text = markdown(samples)
    document = {"samples": [asdict(sample) for sample in samples]}
    script.publish("keeper", about=about, document=document, markdown=text, directory=arguments.out)
    return 0


if __name__ == "__main__":
    script.run(main)
