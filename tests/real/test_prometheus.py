"""A real Prometheus scrapes a real server through losses, and our rules fire as meant: no alert more, and none less."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from external import need
from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.testing.server import free_port
from ghostserve.web.admin import Refused
from real import kit
from real.kit import Ask, Served
from real.scraping import scrape, wait_until

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(400)]

DEPLOY = Path(__file__).parents[2] / "deploy" / "prometheus"
SOON = "1s"


class Prometheus:
    """A server of its own, with our rules: only scrape interval and `for:` are shorter than what we ship."""

    def __init__(self, folder: Path, target: str) -> None:
        config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
        config["global"] = {
            "scrape_interval": "500ms",
            "scrape_timeout": "500ms",
            "evaluation_interval": "500ms",
        }
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
        rules = yaml.safe_load((DEPLOY / "ghostserve.rules.yml").read_text())
        for rule in rules["groups"][0]["rules"]:
            if "for" in rule:
                rule["for"] = SOON
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        (folder / "ghostserve.rules.yml").write_text(yaml.safe_dump(rules))
        self.port = free_port()
        self._log = (folder / "prometheus.log").open("wb")
        self._process = subprocess.Popen(
            [
                need("prometheus"), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{self.port}", "--log.level=warn",
            ],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(20)
        self._log.close()

    def ask(self, path: str, **parameters: str) -> Any:
        answer = httpx.get(
            f"http://127.0.0.1:{self.port}/api/v1/{path}", params=parameters, timeout=10, trust_env=False
        )
        answer.raise_for_status()
        return answer.json()["data"]

    def value(self, query: str) -> float | None:
        """Of a query with one series; None if it has none."""
        found = self.ask("query", query=query)["result"]
        return float(found[0]["value"][1]) if found else None

    def firing(self) -> set[str]:
        return {
            alert["labels"]["alertname"]
            for alert in self.ask("alerts")["alerts"]
            if alert["state"] == "firing"
        }

    def wait(self, condition: Callable[[], Any], what: str, timeout_s: float = 40.0) -> None:
        deadline_s = monotonic_s() + timeout_s
        while True:
            try:
                if condition():
                    return
            except httpx.HTTPError:  # it starts
                pass
            assert self._process.poll() is None, Path(self._log.name).read_text()
            assert monotonic_s() < deadline_s, f"{what}; firing: {self.firing()}"
            sleep_s(0.2)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    need("prometheus")  # before a server is started for it
    flags = ("--dtype", "float32", "--enforce-eager", "--disable-log-stats")
    served = kit.serve(tmp_path_factory.mktemp("prometheus-server"), "prometheus", *flags, serving="v1-async")
    yield served
    served.server.stop()


@pytest.fixture(scope="module")
def prometheus(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    started = Prometheus(tmp_path_factory.mktemp("prometheus"), f"127.0.0.1:{served.server.port}")
    try:
        yield started
    finally:
        started.close()


def test_without_log_stats_vllms_are_off_and_ours_on(served: Served) -> None:
    """vLLM's flag keeps its meaning; what ours tell costs no step anything."""
    assert served.run(Ask(max_tokens=20)).error is None
    found = scrape(served.server.base_url)
    assert not [name for name in found.types if name.startswith("vllm:")]
    assert found.get("steps_total") > 0


def test_a_healthy_server_has_no_alert_and_one_loss_is_none(served: Served, prometheus: Prometheus) -> None:
    prometheus.wait(lambda: prometheus.value("up") == 1, "Prometheus does not scrape")
    wait_until(served.server.base_url, lambda now: now.get("standby_ready") == 1, timeout_s=40)
    before = served.recoveries()
    served.kill_after(40, 1)
    assert served.run(Ask(max_tokens=120)).error is None
    served.recovery(after=before)
    prometheus.wait(
        lambda: prometheus.value('ghostserve_recoveries_total{outcome="recovered",path="rebuild"}') == 1,
        "the recovery was not scraped",
    )
    wait_until(served.server.base_url, lambda now: now.get("standby_ready") == 1, timeout_s=40)
    prometheus.wait(lambda: not prometheus.firing(), "an alert stays")
    assert prometheus.value("min_over_time(up[5m])") == 1, "a scrape failed during the outage"
    assert prometheus.value("resets(ghostserve_outage_seconds_count[5m])") == 0
    rules = prometheus.ask("rules")["groups"][0]["rules"]
    assert [rule["health"] for rule in rules] == ["ok"] * len(rules)


def test_losses_again_and_again(served: Served, prometheus: Prometheus) -> None:
    for _ in range(4):
        before = served.recoveries()
        served.kill(1)
        served.recovery(after=before)
        assert served.run(Ask(max_tokens=5)).error is None  # a step gives the attempts back
    prometheus.wait(lambda: "GhostserveRecoveringOften" in prometheus.firing(), "GhostserveRecoveringOften")
    assert prometheus.firing() <= {"GhostserveRecoveringOften", "GhostserveNoStandby"}
    wait_until(served.server.base_url, lambda now: now.get("standby_ready") == 1, timeout_s=40)


def test_memory_that_changed(served: Served, prometheus: Prometheus) -> None:
    served.settle()
    assert served.run(Ask(max_tokens=200)).error is None  # the prefix cache holds something
    served.settle()
    served.rpc("ghost_corrupt_kv", 1, 5)
    # Live KV is compared in a burst a minute.
    prometheus.wait(lambda: "GhostserveScrubMismatch" in prometheus.firing(), "GhostserveScrubMismatch", 90)


def test_a_keeper_that_dies_again_and_again(served: Served, prometheus: Prometheus) -> None:
    def kill_it() -> bool:
        with contextlib.suppress(Refused):  # there is none now
            served.server.admin.inflict("keeper_crash")
        return scrape(served.server.base_url).get("keeper_given_up") == 1

    prometheus.wait(kill_it, "the keeper was not given up")
    prometheus.wait(lambda: "GhostserveKeeperGivenUp" in prometheus.firing(), "GhostserveKeeperGivenUp")


def test_an_engine_that_is_stopped_and_a_server_that_is_gone(served: Served, prometheus: Prometheus) -> None:
    """The front answers on, and says how old its state is; in the end nobody answers."""
    firing_before = prometheus.firing()
    assert not firing_before & {"GhostserveStateStale", "GhostserveDown"}
    (engine,) = [
        child for child in psutil.Process(served.server.pid).children(recursive=True) if "EngineCore" in child.name()
        or "EngineCore" in " ".join(child.cmdline())
    ]  # fmt: skip
    engine.suspend()
    try:
        prometheus.wait(lambda: "GhostserveStateStale" in prometheus.firing(), "GhostserveStateStale")
        assert prometheus.value("up") == 1
    finally:
        engine.resume()
    prometheus.wait(
        lambda: "GhostserveStateStale" not in prometheus.firing(), "it goes on and the alert stays"
    )
    served.server.stop()
    prometheus.wait(lambda: "GhostserveDown" in prometheus.firing(), "GhostserveDown")
