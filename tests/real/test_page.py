"""The page over a real server: a worker is killed from it in mid-answer, and it says how that went."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from browser_kit import WIDE, Visit, chromium_or_not_run
from real import kit

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]
ADMIN_KEY = "chief"
TOKENS, STRUCK_AT = 500, 125


@pytest.fixture(scope="module")
def running() -> Iterator[Browser]:
    with chromium_or_not_run() as browser:
        yield browser


@pytest.fixture(scope="module")
def served(running: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[kit.Served]:
    flags = ("--dtype", "float32", "--enforce-eager", "--ui", "--admin-api-key", ADMIN_KEY)
    served = kit.serve(tmp_path_factory.mktemp("page"), "page", *flags, door=kit.Door(admin_key=ADMIN_KEY))
    try:
        yield served
    finally:
        served.server.stop()


@pytest.fixture
def page(running: Browser, served: kit.Served) -> Iterator[Visit]:
    served.settle()
    visit = Visit(running.new_context(viewport=WIDE), served.server.base_url)
    visit.page.evaluate("key => sessionStorage.setItem('ghostserve-admin-key', key)", ADMIN_KEY)
    visit.shows("#rank-1 .state", "alive")
    yield visit
    assert visit.errors == []
    visit.page.context.close()


def strike(page: Visit, served: kit.Served, button: str, deed: str = "was killed") -> None:
    """Press it in mid-answer. The stream stands still meanwhile: a browser that gets little processor is not late."""
    served.arm(point="scheduled", rank=0, action="pause", skip=STRUCK_AT - 1)
    try:
        page.ask(TOKENS)
        page.wait_tokens(STRUCK_AT - 10)  # the last ones may wait for text that makes them whole
        served.wait_paused()
        page.page.get_by_role("button", name=button).focus()
        page.page.keyboard.press("Enter")  # a click would wait until nothing moves any more
        page.shows("#notice", deed)
    finally:
        served.post("/resume")


def test_a_kill_from_the_page(page: Visit, served: kit.Served) -> None:
    before, pid = served.recoveries(), served.server.status()["ranks"][1]["pid"]
    strike(page, served, "Kill rank 1")
    line = page.outcome("✓", seconds=90)
    assert re.fullmatch(r"recovered in [\d.]+ (ms|s) · 0 lost · 0 duplicated · identical ✓", line)
    status = served.server.status()
    assert status["recoveries_total"] == before + 1
    report = status["last_recovery"]
    assert (report["path"], report["lost_pids"]) == ("rebuild", [pid])
    # The page shows what the server has measured.
    names, values = (page.page.locator(f"#phases .{part}").all_inner_texts() for part in ("name", "value"))
    shown_ms = {name: float(value.removesuffix(" ms")) for name, value in zip(names, values, strict=True)}
    assert shown_ms == pytest.approx(report["phases_ms"], abs=0.051)
    kinds = page.page.locator("#events li").evaluate_all("all => all.map(one => one.dataset.kind)")
    assert "rank_lost" in kinds
    card = page.page.locator("#rank-1 dl").inner_text()
    assert str(status["ranks"][1]["pid"]) in card
    assert "of 48.0 MiB" in card


def test_without_the_restore_it_is_red(page: Visit, served: kit.Served) -> None:
    """The negative control of the test above; without the scrub, which would put right what was not restored."""
    served.server.set_switch("skip_restore", True)
    try:
        with served.unscrubbed():
            strike(page, served, "Kill rank 1")
            line = page.outcome("NOT identical ✗", seconds=90)
    finally:
        served.server.set_switch("skip_restore", False)
    assert "✓" not in line
    expect(page.page.locator("#outcome")).to_have_class("bad")
    assert page.page.locator(".differs").count() > 0


def test_a_hang_from_the_menu(page: Visit, served: kit.Served) -> None:
    before = served.recoveries()
    page.page.locator("#rank-0 summary").click()
    strike(page, served, "Hang rank 0", "was stopped")
    assert "0 lost · 0 duplicated · identical ✓" in page.outcome("✓", seconds=90)
    assert served.recoveries() == before + 1


def test_without_the_admin_key_nobody_is_killed(page: Visit, served: kit.Served) -> None:
    page.page.evaluate("() => sessionStorage.clear()")
    before, kill = served.recoveries(), page.page.get_by_role("button", name="Kill rank 1")
    kill.press("Enter")
    page.shows("#notice", "faults on this server want its admin key")
    assert served.recoveries() == before
    page.page.keyboard.type(ADMIN_KEY)
    page.page.keyboard.press("Enter")
    expect(kill).to_be_focused()
    kill.press("Enter")
    page.outcome("while nothing was asked for")
    assert served.recoveries() == before + 1


@pytest.mark.slow  # it starts a second server
def test_what_other_answers_to_a_loss_cost(page: Visit, served: kit.Served) -> None:
    strike(page, served, "Kill rank 1")
    page.outcome("✓", seconds=90)
    page.page.get_by_role("button", name="Measure").click()
    values = page.page.locator("#costs .value")
    page.shows("#measure-progress", "measured by starting", seconds=90)
    expect(values.nth(2)).to_have_text(re.compile(r"^[\d.]+ (ms|s)$"), timeout=240_000)
    assert re.fullmatch(r"[\d.]+ (ms|s)", values.nth(1).inner_text())
    status = served.server.status()
    assert status["switches"]["force_recompute"] is False
    assert status["restart"]["seconds"] > 2
    assert [report["path"] for report in status["recoveries"]][-1] == "recompute"
    kit.STARTED.append("page: the second server")
