"""`/metrics` of a real server: vLLM's names, ours beside them, before, during and after losses."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from ghostserve.testing.server import ServerProcess, stock_command
from ghostserve.types import Phase
from ghostserve.web.metric_table import METRICS
from real.kit import TINY, Ask, Served, assert_same, fresh_salt
from real.scraping import Scrape, Scraper, parse, scrape, wait_until, went_back

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]

VLLM_METRICS = Path(__file__).parent / "vllm_metrics.txt"
BLOCK = 32
PROMPT = [7 + token % 90 for token in range(100)]
LONG = Ask(max_tokens=120)


@pytest.fixture
def empty(float32: Served):
    """A server whose KV holds nothing, so that tokens can be counted."""
    float32.settle()
    float32.post("/reset_prefix_cache")
    wait_until(url(float32), lambda now: now.get("protected_tokens") == now.get("unprotected_tokens") == 0)
    yield float32
    float32.server.admin.disarm_faults()
    float32.settle()


def url(served: Served) -> str:
    return served.server.base_url


def complete(served: Served, prompt: Sequence[int], max_tokens: int) -> int:
    """Ask for exactly so many tokens; how many tokens the request had in the end."""
    body = {
        "model": "tiny",
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "cache_salt": fresh_salt(),
    }
    answer = httpx.post(f"{url(served)}/v1/completions", json=body, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    usage: dict[str, Any] = answer.json()["usage"]
    assert usage["prompt_tokens"] == len(prompt)
    return int(usage["total_tokens"])


def names_of(scraped: Scrape) -> set[str]:
    """As vLLM's list has them; `_created` comes and goes with what was asked for."""
    return {name for name in scraped.types if not name.endswith("_created")}


# -- what is there -------------------------------------------------------------------------------------


def test_vllms_names_are_all_there_and_ours_beside_them(float32: Served) -> None:
    complete(float32, PROMPT, 2)
    scraped = scrape(url(float32))
    stock = set(VLLM_METRICS.read_text().split())
    assert len(stock) > 50
    assert stock - names_of(scraped) == set()
    ours = {metric.name.removesuffix("_total"): metric.kind for metric in METRICS}
    assert {name: kind for name, kind in scraped.types.items() if name.startswith("ghostserve_")} == ours
    assert names_of(scraped) - stock == set(ours)


@pytest.mark.slow
def test_the_list_of_vllms_names_is_that_of_stock_vllm(tmp_path: Path) -> None:
    """Recorded, so that `make test` need not start a second server: `tests/real/vllm_metrics.txt`."""
    command = stock_command(
        TINY, "--tensor-parallel-size", "1", "--max-model-len", "512", "--enforce-eager", "--dtype", "float32",
        "--kv-cache-memory-bytes", str(8 << 20), "--served-model-name", "tiny",
    )  # fmt: skip
    with ServerProcess(command, log_dir=tmp_path) as server:
        server.start()
        server.wait_ready(timeout_s=200)
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 2}
        assert httpx.post(f"{server.base_url}/v1/completions", json=body, timeout=60).status_code == 200
        assert sorted(names_of(scrape(server.base_url))) == VLLM_METRICS.read_text().split()


def test_formats_are_those_of_vllms_endpoint(float32: Served) -> None:
    """`/metrics` answers in the plain format as ever, `/metrics/` in what is asked for, and filters."""
    plain = httpx.get(f"{url(float32)}/metrics", trust_env=False)
    assert plain.headers["content-type"].startswith("text/plain")
    with_slash = f"{url(float32)}/metrics/"
    one = httpx.get(with_slash, params={"name[]": "ghostserve_failures_total"}, trust_env=False)
    assert set(parse(one.text).types) == {"ghostserve_failures"}
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    opened = httpx.get(with_slash, headers=accept, trust_env=False)
    assert opened.headers["content-type"].startswith("application/openmetrics-text")
    assert 'ghostserve_failures_total{kind="crash"}' in opened.text


# -- tokens --------------------------------------------------------------------------------------------


def test_protected_tokens_are_those_of_the_prefix_cache_once_a_request_has_ended(empty: Served) -> None:
    """The last token of an answer was never computed; of the rest vLLM's cache keeps whole blocks."""
    total = complete(empty, PROMPT, 70)
    expected = (total - 1) // BLOCK * BLOCK
    assert expected == 160
    now = wait_until(url(empty), lambda now: now.get("protected_tokens") == expected)
    assert (now.get("unprotected_tokens"), now.get("shadow_lag_tokens")) == (0, 0)
    settled = empty.settle()["shadow"]
    now = scrape(url(empty))
    assert now.get("parity_bytes") == expected / BLOCK * settled["frame_bytes"]
    assert now.get("mirror_bytes") == 0
    assert 0 < now.get("parity_bytes") < now.get("host_used_bytes") < now.get("host_needed_bytes")
    assert now.get("host_needed_bytes") < now.get("host_budget_bytes")


def test_tokens_without_a_copy_are_unprotected_until_a_step_catches_up_on_them(empty: Served) -> None:
    empty.server.admin.inflict("memory_exhausted", steps=0)
    total = complete(empty, PROMPT, 20)
    expected = (total - 1) // BLOCK * BLOCK
    now = wait_until(url(empty), lambda now: now.get("unprotected_tokens") == expected)
    assert now.get("protected_tokens") == 0
    empty.server.admin.disarm_faults()
    complete(empty, PROMPT[:5], 20)  # a block per step
    # While a step is on its way what it catches up on is neither: the figures may be those of the request's last steps.
    now = wait_until(url(empty), lambda now: now.get("protected_tokens") == expected)
    assert (now.get("unprotected_tokens"), now.get("shadow_lag_tokens")) == (0, 0)


def test_lag_is_what_a_step_in_flight_writes(empty: Served) -> None:
    """A rank that hangs in a prompt's step: so many tokens are on their way, none is safe yet, none was shown."""
    before = scrape(url(empty))
    empty.arm(point="before_model", rank=1, action="hang")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(complete, empty, PROMPT, 8)
        now = wait_until(url(empty), lambda now: now.get("shadow_lag_tokens") > 0)
        assert 0 <= now.get("shadow_lag_tokens") - len(PROMPT) <= 1, "one more: the step scheduled behind it"
        assert now.get("protected_tokens") == 0
        answer.result(timeout=60)
    after = wait_until(url(empty), lambda now: now.get("protected_tokens") == 96)
    assert after.get("shadow_lag_tokens") == 0
    assert after.get("failures_total", kind="hang") == before.get("failures_total", kind="hang") + 1


# -- losses --------------------------------------------------------------------------------------------


def grown(before: Scrape, after: Scrape, name: str, **labels: str) -> float:
    return after.get(name, **labels) - before.get(name, **labels)


def test_a_kill_while_it_is_scraped(float32: Served) -> None:
    float32.settle()
    reference, recoveries = float32.reference(LONG), float32.recoveries()
    before = scrape(url(float32))
    float32.kill_after(60, 1)
    with Scraper(url(float32)) as scraper:
        assert_same(reference, float32.run(LONG))
        float32.recovery(after=recoveries)
        wait_until(url(float32), lambda now: now.get("server_state", state="serving") == 1)
    after = scrape(url(float32))
    assert scraper.failures == [], "a scrape was not answered"
    assert went_back([before, *scraper.scrapes, after]) == []
    during = [now for now in scraper.scrapes if now.get("server_state", state="recovering") == 1]
    assert during, "no scrape was answered during the outage"
    assert any(now.get("worker_state", rank="1", state="lost") == 1 for now in during)
    assert after.get("worker_state", rank="1", state="alive") == 1
    assert grown(before, after, "failures_total", kind="crash") == 1
    assert grown(before, after, "recoveries_total", path="rebuild", outcome="recovered") == 1
    assert grown(before, after, "requests_resumed_total") == 1
    assert grown(before, after, "outage_seconds_count") == 1
    for phase in Phase:
        assert grown(before, after, "recovery_seconds_count", phase=phase.value) == 1, phase
    phases_s = sum(grown(before, after, "recovery_seconds_sum", phase=phase.value) for phase in Phase)
    assert phases_s == pytest.approx(grown(before, after, "outage_seconds_sum"), abs=1e-6)
    assert grown(before, after, "kv_rebuilt_bytes_total") > 0
    assert grown(before, after, "tokens_recomputed_total") == 0


def test_a_forced_recompute_is_counted_as_one(float32: Served) -> None:
    float32.settle()
    recoveries, before = float32.recoveries(), scrape(url(float32))
    float32.server.set_switch("force_recompute", True)
    float32.kill_after(60, 0)
    try:
        assert float32.run(LONG).error is None
        report = float32.recovery(after=recoveries)
    finally:
        float32.server.set_switch("force_recompute", False)
    after = scrape(url(float32))
    assert report["path"] == "recompute", report
    assert grown(before, after, "recoveries_total", path="recompute", outcome="recovered") == 1
    assert grown(before, after, "tokens_recomputed_total") == report["tokens_recomputed"] > 60
    assert grown(before, after, "requests_recomputed_total") == 1


def test_a_step_that_raises_is_no_crash(float32: Served) -> None:
    recoveries, before = float32.recoveries(), scrape(url(float32))
    float32.arm(point="before_model", rank=0, action="raise")
    assert float32.run(Ask(max_tokens=20)).error is None
    float32.recovery(after=recoveries)
    after = scrape(url(float32))
    assert grown(before, after, "failures_total", kind="raised") == 1
    assert grown(before, after, "failures_total", kind="crash") == 0


def kernels_oom_kills() -> int:
    """As the kernel counts them; 0 where it does not."""
    fields = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(fields.get("oom_kill", 0))


def test_a_rank_killed_for_its_memory_is_told_from_a_crash(float32: Served) -> None:
    """As far as this kernel counts such kills."""
    kills, recoveries, before = kernels_oom_kills(), float32.recoveries(), scrape(url(float32))
    float32.server.admin.inflict("oom", rank=1)
    assert float32.run(Ask(max_tokens=20)).error is None
    float32.recovery(after=recoveries)
    after = scrape(url(float32))
    told = kernels_oom_kills() > kills
    assert grown(before, after, "failures_total", kind="oom") == int(told)
    assert grown(before, after, "failures_total", kind="crash") == int(not told)


def test_losses_of_keeper_and_standby(float32: Served) -> None:
    ready = wait_until(url(float32), lambda now: now.get("standby_ready") >= 1)
    assert (ready.get("keeper_up"), ready.get("standby_wanted")) == (1, 1)
    float32.server.admin.inflict("keeper_crash")
    float32.server.admin.inflict("standby_dead")
    for kind in ("keeper", "standby"):
        wait_until(url(float32), lambda now, kind=kind: grown(ready, now, "failures_total", kind=kind) == 1)
    after = wait_until(
        url(float32), lambda now: now.get("standby_ready") >= 1 and now.get("keeper_up") == 1, timeout_s=30
    )
    assert grown(ready, after, "keeper_restarts_total") == 1
    assert grown(ready, after, "recoveries_total", path="rebuild", outcome="recovered") == 0
    assert after.get("keeper_given_up") == 0
