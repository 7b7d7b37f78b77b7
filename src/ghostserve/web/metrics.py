"""Our metrics in vLLM's own `/metrics`.

vLLM answers `/metrics` from prometheus_client's registry of this process, to which a collector of ours is added: its
names and formats stay as they are. The collector reads the control page and asks nobody, so a
scrape is answered during an outage. Like vLLM's, the route is open also where there is an API key.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from typing import Any, Protocol

from prometheus_client import REGISTRY, CollectorRegistry, make_asgi_app, multiprocess
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from starlette.routing import Mount

from ghostserve.arena.ledger import BUCKETS_S, Histogram, Ledger
from ghostserve.clock import monotonic_s
from ghostserve.web.metric_table import METRICS, Metric, Series, Snapshot
from ghostserve.web.weights_pool import PoolReading

logger = logging.getLogger(__name__)

MULTIPROCESS_ENV = "PROMETHEUS_MULTIPROC_DIR"
Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily
_BOUNDS: tuple[str, ...] = (*map(floatToGoString, BUCKETS_S), "+Inf")


class MetricsPage(Protocol):
    """What metrics need of `arena.control.ControlPage`."""

    @property
    def ledger(self) -> Ledger: ...

    @property
    def keeper_pid(self) -> int | None: ...

    @property
    def keeper_given_up(self) -> bool: ...

    def read_state(self) -> dict[str, Any] | None: ...

    def counters(self) -> Mapping[str, int]: ...


class PageCollector(Collector):
    """Reads the page at each scrape. A metric that cannot be read is left out, and told once: the others are served."""

    def __init__(self, page: MetricsPage, pool: Callable[[], PoolReading] = PoolReading) -> None:
        self._page = page
        self._pool = pool
        self._told: set[str] = set()

    def describe(self) -> Iterable[Family]:
        """Names only, so that they are known to be taken."""
        return [_filled(metric, ()) for metric in METRICS]

    def collect(self) -> Iterable[Family]:
        try:
            snapshot = self._read()
        except Exception as error:
            self._tell("the control page", error)
            return
        for metric in METRICS:
            try:
                yield _filled(metric, metric.read(snapshot))
            except Exception as error:
                self._tell(metric.name, error)

    def _read(self) -> Snapshot:
        return Snapshot(
            state=self._page.read_state() or {},
            counters=self._page.counters(),
            ledger=self._page.ledger,
            keeper_pid=self._page.keeper_pid,
            keeper_given_up=self._page.keeper_given_up,
            now_s=monotonic_s(),
            pool=self._pool(),
        )

    def _tell(self, what: str, error: Exception) -> None:
        if what not in self._told:
            self._told.add(what)
            logger.error("%s cannot be read", what, exc_info=error)


def _filled(metric: Metric, series: Series) -> Family:
    """The family of a metric, with these series."""
    if metric.kind == "histogram":
        histograms = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
        for labels, value in series:
            assert isinstance(value, Histogram), metric.name
            buckets = list(zip(_BOUNDS, accumulate(value.counts), strict=True))
            histograms.add_metric(labels, buckets, value.sum_s)
        return histograms
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    values = kind(metric.name, metric.help, labels=metric.labels)
    for labels, value in series:
        assert not isinstance(value, Histogram), metric.name
        values.add_metric(labels, value)
    return values


_exposed: PageCollector | None = None


def expose(app: Any, page: MetricsPage, pool: Callable[[], PoolReading] = PoolReading) -> None:
    """Add ours to the `/metrics` of vLLM's app. A process serves one page: a later one takes the place of an earlier."""
    if MULTIPROCESS_ENV in os.environ:
        app.router.routes.insert(0, _merged_route(page, pool))
        return
    global _exposed
    if _exposed is not None:
        REGISTRY.unregister(_exposed)
    _exposed = PageCollector(page, pool)
    REGISTRY.register(_exposed)


def _merged_route(page: MetricsPage, pool: Callable[[], PoolReading]) -> Mount:
    """Where the user has vLLM's metrics go through files, vLLM reads these alone: a route before its own reads both."""
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    registry.register(PageCollector(page, pool))
    route = Mount("/metrics", make_asgi_app(registry=registry))
    route.path_regex = re.compile("^/metrics(?P<path>.*)$")  # as vLLM does: no redirect to /metrics/
    return route
