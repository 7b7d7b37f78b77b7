"""What `/metrics` of a real server says, parsed, and a scraper that asks without pause."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import httpx
from prometheus_client.parser import text_string_to_metric_families

from ghostserve.clock import monotonic_s, sleep_s

SCRAPE_MAX_S = 2.0  # on a machine whose cores are all busy
Key = tuple[str, tuple[tuple[str, str], ...]]  # sample name, sorted labels


@dataclass(frozen=True, slots=True)
class Scrape:
    """One answer."""

    samples: dict[Key, float]
    types: dict[str, str]  # family -> type

    def get(self, name: str, **labels: str) -> float:
        """One series of ours, by its exact labels."""
        return self.samples[f"ghostserve_{name}", tuple(sorted(labels.items()))]

    def only_grows(self) -> dict[Key, float]:
        """Samples of counters and histograms."""
        endings = ("_total", "_bucket", "_count", "_sum")
        families = {name for name, kind in self.types.items() if kind in ("counter", "histogram")}
        return {
            key: value
            for key, value in self.samples.items()
            if key[0].endswith(endings) and any(key[0].startswith(name) for name in families)
        }


def parse(text: str) -> Scrape:
    families = list(text_string_to_metric_families(text))
    return Scrape(
        samples={
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in families
            for sample in family.samples
        },
        types={family.name: family.type for family in families},
    )


def scrape(base_url: str) -> Scrape:
    answer = httpx.get(f"{base_url}/metrics", timeout=SCRAPE_MAX_S, trust_env=False)
    assert answer.status_code == 200, answer.text
    return parse(answer.text)


def wait_until(base_url: str, condition: Callable[[Scrape], bool], *, timeout_s: float = 15.0) -> Scrape:
    """The first scrape for which it holds."""
    deadline_s = monotonic_s() + timeout_s
    while not condition(found := scrape(base_url)):
        assert monotonic_s() < deadline_s, {k: v for k, v in found.samples.items() if "_bucket" not in k[0]}
        sleep_s(0.03)
    return found


@dataclass(slots=True)
class Scraper:
    """Asks again and again in a thread of its own for as long as it is entered."""

    base_url: str
    scrapes: list[Scrape] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Scraper:
        self._thread = threading.Thread(target=self._run, daemon=True, name="scraper")
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopping.set()
        assert self._thread is not None
        self._thread.join(3 * SCRAPE_MAX_S)

    def _run(self) -> None:
        while not self._stopping.wait(0.05):
            try:
                self.scrapes.append(scrape(self.base_url))
            except (httpx.HTTPError, AssertionError) as error:
                self.failures.append(repr(error))


def went_back(scrapes: list[Scrape]) -> list[str]:
    """Samples that became smaller, or were gone, from one scrape to the next; those of Python's own runtime aside."""
    found = []
    for before, after in pairwise(scrapes):
        later = after.only_grows()
        for key, value in before.only_grows().items():
            if key[0].startswith(("ghostserve_", "vllm:")) and later.get(key, -1.0) < value:
                found.append(f"{key}: {value} -> {later.get(key)}")
    return found
