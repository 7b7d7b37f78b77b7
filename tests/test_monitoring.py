"""The files for Prometheus and Grafana, and the tables of docs/operations.md: they speak of metrics that exist, and alerts fire."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from external import need
from ghostserve.testing.fake_engine import FakeEngine
from ghostserve.web.metric_table import METRICS
from ghostserve.web.metrics import PageCollector

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES, RULES_TEST = PROMETHEUS / "ghostserve.rules.yml", PROMETHEUS / "ghostserve.rules.test.yml"
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "ghostserve.json").read_text())
DOCS = (ROOT / "docs" / "operations.md").read_text()
ALERTS = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
VLLM_METRICS = (ROOT / "tests" / "real" / "vllm_metrics.txt").read_text().split()


def series_known() -> set[str]:
    """Every name that a query may ask for: ours, and those of vLLM's own server, with what their kind adds."""
    names = {"up"}
    for metric in METRICS:
        names |= {metric.name} if metric.kind != "histogram" else histogram(metric.name)
    for name in VLLM_METRICS:
        names |= {name, f"{name}_total", *histogram(name)}
    return names


def histogram(name: str) -> set[str]:
    return {f"{name}_{part}" for part in ("bucket", "sum", "count")}


def names_in(query: str) -> set[str]:
    """Names of ours, of vLLM's and of its process in a query, outside of strings; and `up`."""
    return set(re.findall(r"\b(?:ghostserve_|vllm:|process_)\w+|\bup\b", re.sub(r'"[^"]*"', "", query)))


def queries(panels: list[dict[str, Any]]) -> Iterator[str]:
    for panel in panels:
        yield from (target["expr"] for target in panel.get("targets", ()))


def promtool(*words: str | Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [need("promtool"), *words], capture_output=True, text=True, timeout=60, input=text, check=False
    )


# -- names ---------------------------------------------------------------------------------------------


def test_alerts_ask_for_metrics_that_exist() -> None:
    for rule in ALERTS:
        names = names_in(rule["expr"])
        assert names, rule["alert"]
        assert names <= series_known(), rule["alert"]


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    asked = set().union(*(names_in(query) for query in queries(DASHBOARD["panels"])))
    assert asked <= series_known()
    ours = {metric.name for metric in METRICS}
    shown = {re.sub("_(bucket|sum|count)$", "", name) for name in asked}
    assert len(shown & ours) > 20
    assert any(name.startswith("vllm:") for name in shown)


@pytest.mark.parametrize("query", ["ghostserve_protected_token", "rate(vllm:no_such_total[5m])"])
def test_a_name_that_does_not_exist_is_found(query: str) -> None:
    assert not names_in(query) <= series_known()


def test_the_dashboard_is_whole() -> None:
    assert DASHBOARD["schemaVersion"] == 39
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource", "job", "instance"}
    places: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        taken = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not taken & places, panel["title"]
        places |= taken
        assert panel["type"] == "row" or panel["targets"], panel["title"]
        used = set(re.findall(r"\$\{?(\w+)", json.dumps(panel))) - {"__rate_interval", "__all"}
        assert used <= variables, panel["title"]


# -- words ---------------------------------------------------------------------------------------------


def test_the_docs_have_every_metric_with_its_type_labels_and_meaning() -> None:
    rows = [line for line in DOCS.splitlines() if line.startswith("| `ghostserve_")]
    assert rows == [
        f"| `{metric.name}` | {metric.kind} | {', '.join(f'`{label}`' for label in metric.labels) or '–'} | {metric.help} |"
        for metric in METRICS
    ]


def test_every_alert_says_what_it_is_and_what_to_do() -> None:
    headings = re.findall(
        r"^### (\w+)$", DOCS.partition("\n## Alerts\n")[2].partition("\n## ")[0], re.MULTILINE
    )
    assert headings == [rule["alert"] for rule in ALERTS]
    for rule in ALERTS:
        notes = rule["annotations"]
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert notes["summary"].endswith(".")
        assert len(notes["description"]) > 80
        assert notes["runbook_url"] == f"docs/operations.md#{rule['alert'].lower()}"


# -- promtool ------------------------------------------------------------------------------------------


def test_promtool_takes_rules_and_configuration() -> None:
    for words in (("check", "rules", RULES), ("check", "config", PROMETHEUS / "prometheus.yml")):
        done = promtool(*words)
        assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_finds_nothing_wrong_with_our_metrics() -> None:
    """Names, units, types, help: `promtool check metrics` lints them."""
    engine = FakeEngine()
    registry = CollectorRegistry()
    registry.register(PageCollector(engine))
    try:
        text = generate_latest(registry).decode()
    finally:
        engine.close()
    done = promtool("check", "metrics", text=text)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    bad = text.replace("ghostserve_epoch", "ghostserve_epoch_total")
    assert promtool("check", "metrics", text=bad).returncode == 3, "the lint can fail"


def test_each_alert_fires_and_does_not_fire() -> None:
    done = promtool("test", "rules", RULES_TEST)
    assert done.returncode == 0, done.stdout + done.stderr
    text = RULES_TEST.read_text()
    for rule in ALERTS:
        assert f'alertname="{rule["alert"]}", alertstate="firing"' in text
        assert "for" not in rule or f'alertname="{rule["alert"]}", alertstate="pending"' in text


@pytest.mark.parametrize("wrong", ["vector(1) == 1", "vector(1) == 0"], ids=["always", "never"])
def test_an_alert_that_is_wrong_fails_its_test(tmp_path: Path, wrong: str) -> None:
    """The negative control: alerts that are always there, or never, are seen by the unit tests of each."""
    shutil.copy(RULES_TEST, tmp_path)
    rules = yaml.safe_load(RULES.read_text())
    for rule in rules["groups"][0]["rules"]:
        rule["expr"] = wrong
    (tmp_path / RULES.name).write_text(yaml.safe_dump(rules))
    done = promtool("test", "rules", tmp_path / RULES_TEST.name)
    assert done.returncode == 1, done.stdout + done.stderr
    for rule in ALERTS:
        assert f'alertname="{rule["alert"]}"' in done.stdout + done.stderr
