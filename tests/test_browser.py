"""The page in a real browser, over the stand-in server: what it says after a kill, and that everybody can use it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from browser_kit import NARROW, WIDE, FakeServer, Visit, chromium_or_not_run, fake_server
from ghostserve.testing.oracle import compare

pytestmark = [pytest.mark.long, pytest.mark.timeout(120)]
Open = Callable[..., Visit]
FAST = ("--token-s", "0.008", "--outage-s", "0.6")


@pytest.fixture(scope="module")
def running() -> Iterator[Browser]:
    with chromium_or_not_run() as browser:
        yield browser


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with fake_server(*FAST, "--standbys", "1") as server:
        yield server


@pytest.fixture
def visit(running: Browser, server: FakeServer) -> Iterator[Open]:
    """Open the page; at the end it must have raised nothing, and asked nobody but its server."""
    visits: list[tuple[Visit, str]] = []

    def open_page(url: str = server.url, **context: Any) -> Visit:
        made = running.new_context(**({"viewport": WIDE} | context))
        visits.append((Visit(made, url), url))
        return visits[-1][0]

    yield open_page
    for seen, url in visits:
        assert seen.errors == []
        assert seen.hosts == {url.removeprefix("http://")}
        seen.page.context.close()


@pytest.fixture
def unrestored(server: FakeServer) -> Iterator[None]:
    """The negative control: what follows a loss is other text."""
    server.post("/ghostserve/switches", {"skip_restore": True})
    yield
    server.post("/ghostserve/switches", {"skip_restore": False})


def kill_in_mid_answer(page: Visit, *, tokens: int = 150) -> None:
    expect(page.page.locator("#rank-1 .state")).to_have_text("alive")
    page.ask(tokens)
    page.wait_tokens(40)
    page.page.get_by_role("button", name="Kill rank 1").click()


# -- what it says ----------------------------------------------------------------------------------------------------


def test_a_kill_in_mid_answer(visit: Open) -> None:
    page = visit()
    expect(page.page.locator("#state")).to_have_text("serving")
    before = page.page.locator("#rank-1 dd").first.inner_text()
    page.page.evaluate(
        "() => { window.said = []; new MutationObserver(() => window.said.push("
        "document.getElementById('outcome').textContent)).observe(document.getElementById('outcome'), {childList: true}); }"
    )
    kill_in_mid_answer(page)
    page.outcome("recovering…")
    line = page.outcome("✓")
    assert line.endswith("ms · 0 lost · 0 duplicated · identical ✓")
    assert line.startswith("recovered in ")
    outage_ms = float(line.split()[2])
    assert 600 <= outage_ms < 5000  # the stand-in takes 600
    assert page.page.locator(".struck").inner_text() == "✗ rank 1 killed"
    assert page.page.locator("#rank-1 dd").first.inner_text() != before
    phases = page.page.locator("#phases li").all_inner_texts()
    assert [text.split()[0] for text in phases] == [
        "detect", "fence", "leave", "spawn", "regroup", "weights", "state", "kv", "retry"
    ]  # fmt: skip
    # A screen reader hears a few sentences, not each token.
    assert len(page.page.evaluate("() => window.said")) <= 6


def test_a_difference_is_red(visit: Open, unrestored: None) -> None:
    """The negative control of the test above."""
    page = visit()
    kill_in_mid_answer(page)
    line = page.outcome("NOT identical ✗")
    assert "changed" in line
    assert "✓" not in line
    expect(page.page.locator("#outcome")).to_have_class("bad")
    assert page.page.locator(".differs").count() > 0
    assert page.violations() == []


def test_an_answer_without_a_failure(visit: Open) -> None:
    page = visit()
    page.ask(40)
    assert page.outcome("✓") == "nobody failed · 0 lost · 0 duplicated · identical ✓"


def test_a_loss_while_nothing_is_asked_for_is_told(visit: Open, server: FakeServer) -> None:
    page, other = visit(), visit()
    expect(page.page.locator("#rank-0 .state")).to_have_text("alive")
    kill_in_mid_answer(other)
    page.outcome("while nothing was asked for")
    other.outcome("✓")


def test_stop_ends_the_answer(visit: Open) -> None:
    page = visit()
    page.ask(2000)
    page.wait_tokens(10)
    page.page.get_by_role("button", name="Stop").click()
    page.outcome("stopped; nothing was compared")
    expect(page.page.get_by_role("button", name="Stream it")).to_be_enabled()


def test_cards_memory_and_tokens(visit: Open) -> None:
    page = visit()
    page.ask(100)
    page.outcome("✓")
    facts = page.page.locator("#rank-0 dl").inner_text().split("\n")
    assert {"pid", "device", "KV protected", "last step", "step time"} <= set(facts)
    assert "of 64.0 MiB" in page.page.locator("#rank-0 dl").inner_text()
    assert page.page.locator("#standby-0 .state").inner_text() == "ready"
    assert page.page.locator("#keeper .state").inner_text() == "running"
    memory = page.page.locator("#memory").inner_text()
    assert all(kind in memory for kind in ("parity", "mirrors", "free", "budget", "weights"))
    bar = page.page.locator("#memory-bar span[data-kind=parity]")
    assert float(bar.evaluate("part => part.getBoundingClientRect().width")) > 0
    protected, bare, lag = page.page.locator("#tokens dd").all_inner_texts()
    assert int(protected) >= 200
    assert (bare, lag) == ("0", "0 tokens")


def test_the_timeline_without_an_event_log(visit: Open) -> None:
    with fake_server(*FAST, "--no-event-log") as silent:
        page = visit(silent.url)
        kill_in_mid_answer(page)
        page.outcome("✓")
        kinds = page.page.locator("#events li").evaluate_all("all => all.map(one => one.dataset.kind)")
    oldest_first = kinds[::-1]
    wanted = {
        "fault_injected",
        "recovery_begun",
        "rank_lost",
        "rank_taken",
        "recovery_ended",
        "server_serving",
    }
    assert (set(oldest_first), len(oldest_first)) == (wanted, len(wanted))
    assert oldest_first.index("rank_lost") < oldest_first.index("rank_taken")
    assert oldest_first[-1] == "server_serving"


def test_the_timeline_of_the_event_log(visit: Open) -> None:
    page = visit()
    kill_in_mid_answer(page)
    page.outcome("✓")
    for kind in ("rank_lost", "rank_taken", "recovery_ended"):  # once: nothing is derived beside it
        newest = page.page.locator(f"#events li[data-kind={kind}]")
        expect(newest.first).to_be_visible()
    kinds = page.page.locator("#events li").evaluate_all("all => all.map(one => one.dataset.kind)")
    newest_first = kinds[: kinds.index("rank_lost") + 1]
    assert newest_first.count("recovery_ended") == newest_first.count("rank_taken") == 1


def test_other_faults_are_sent(visit: Open) -> None:
    page = visit()
    expect(page.page.locator("#rank-0 .state")).to_have_text("alive")
    page.page.locator("#rank-0 summary").click()
    for name, body in (
        ("Slow rank 0", {"rank": 0, "how": "slow", "factor": 5, "steps": 100}),
        ("Corrupt rank 0", {"rank": 0, "how": "corrupt"}),
    ):
        with page.page.expect_request("**/ghostserve/kill") as request:
            page.page.get_by_role("button", name=name).click()
        assert request.value.post_data_json == body
    expect(page.page.locator("#notice")).to_contain_text("bits of its KV flipped")


def test_what_other_answers_to_a_loss_cost(visit: Open) -> None:
    page = visit()
    kill_in_mid_answer(page)
    page.outcome("✓")
    values = page.page.locator("#costs .value")
    assert values.all_inner_texts()[1:] == ["not measured", "not measured"]
    page.page.get_by_role("button", name="Measure").click()
    expect(values.nth(2)).to_contain_text("starting", timeout=30_000)
    recomputed = values.nth(1).inner_text()
    assert (
        float(recomputed.removesuffix(" ms")) >= 550
    )  # the stand-in takes 600, less what passes until the first look
    expect(values.nth(2)).to_have_text("2500 ms")
    page.page.reload()
    expect(values.nth(1)).to_have_text(recomputed)
    expect(values.nth(2)).to_have_text("2500 ms")


# -- whom it survives ------------------------------------------------------------------------------------------------


def test_a_restart_of_the_server(visit: Open) -> None:
    with fake_server(*FAST) as mortal:
        page = visit(mortal.url)
        expect(page.page.locator("#state")).to_have_text("serving")
        pid = page.page.locator("#rank-0 dd").first.inner_text()
        assert mortal.stop() < 3  # the page that watches does not hold it up
        expect(page.page.locator("#state")).to_have_text("reconnecting…")
        assert page.violations() == []
        mortal.start()
        expect(page.page.locator("#state")).to_have_text("serving")
        expect(page.page.locator("#rank-0 dd").first).not_to_have_text(pid)
        page.ask(20)
        page.outcome("✓")


def test_a_server_that_goes_in_mid_answer(visit: Open) -> None:
    with fake_server("--token-s", "0.05", "--exit-code-at-loss", "4") as mortal:
        page = visit(mortal.url)
        kill_in_mid_answer(page)
        page.outcome("the answer broke: ")
        expect(page.page.locator("#state")).to_have_text("reconnecting…")
        mortal.start()
        page.ask(20)
        page.outcome("✓")


def test_the_key_is_asked_for(visit: Open) -> None:
    with fake_server(*FAST, "--api-key", "right") as keyed:
        page = visit(keyed.url)
        field = page.page.get_by_label("This server wants its API key")
        expect(field).to_be_focused()
        assert page.violations() == []
        field.fill("wrong")
        page.page.keyboard.press("Enter")
        expect(field).to_be_visible()
        field.fill("right")
        page.page.keyboard.press("Enter")
        expect(page.page.locator("#state")).to_have_text("serving")
        expect(field).to_be_hidden()
        kill_in_mid_answer(page)
        page.outcome("✓")


def test_without_fault_injection_it_is_explained(visit: Open) -> None:
    with fake_server(*FAST, "--no-fault-injection") as calm:
        page = visit(calm.url)
        expect(page.page.get_by_text("--enable-fault-injection")).to_be_visible()
        assert page.page.get_by_role("button", name="Kill rank 0").count() == 0
        assert page.violations() == []


# -- who can use it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_no_barrier_in_any_state(visit: Open, scheme: str, viewport: dict[str, int]) -> None:
    page = visit(viewport=viewport, color_scheme=scheme, reduced_motion="reduce")
    expect(page.page.locator("#rank-1 .state")).to_have_text("alive")
    page.page.locator("#rank-1 summary").click()
    found = {"idle": page.violations()}
    page.ask(400)  # a check takes up to a second
    page.wait_tokens(40)
    found["streaming"] = page.violations()
    page.page.get_by_role("button", name="Kill rank 1").click()
    page.outcome("recovering…")
    found["recovering"] = page.violations()
    page.outcome("✓")
    found["recovered"] = page.violations()
    assert {state: barriers for state, barriers in found.items() if barriers} == {}
    width = page.page.evaluate("() => document.documentElement.scrollWidth")
    assert width <= viewport["width"]


def test_the_barrier_check_can_fail(visit: Open) -> None:
    """The negative control of the check by axe-core."""
    page = visit()
    page.page.evaluate("() => document.body.append(document.createElement('button'))")
    assert any(found.startswith("button-name") for found in page.violations())


def test_the_keyboard_is_enough(visit: Open) -> None:
    """Each control in its order, and the whole way from the prompt to the verdict without a mouse."""
    page = visit()
    expect(page.page.locator("#rank-1 .state")).to_have_text("alive")
    order = []
    for _ in range(11):
        page.page.keyboard.press("Tab")
        order.append(
            page.page.evaluate("() => document.activeElement.id || document.activeElement.ariaLabel")
        )
    assert order == [
        "offered", "length", "go", "stop", "prompt", "answer",
        "Kill rank 0", "More faults for rank 0", "Kill rank 1", "More faults for rank 1", "events",
    ]  # fmt: skip
    page.page.locator("#length").focus()
    page.page.keyboard.press("Control+a")
    page.page.keyboard.type("120")
    page.page.keyboard.press("Enter")
    page.wait_tokens(30)
    page.page.get_by_role("button", name="Kill rank 1").focus()
    page.page.keyboard.press("Enter")
    page.outcome("✓")
    menu = page.page.locator("#rank-0 details")
    menu.locator("summary").focus()
    page.page.keyboard.press("Enter")
    expect(page.page.get_by_role("button", name="Hang rank 0")).to_be_visible()
    page.page.keyboard.press("Tab")
    page.page.keyboard.press("Escape")
    expect(menu.locator("summary")).to_be_focused()
    expect(page.page.get_by_role("button", name="Hang rank 0")).to_be_hidden()


def test_nothing_moves_for_those_who_do_not_want_it(visit: Open) -> None:
    duration = "() => getComputedStyle(document.querySelector('.card')).transitionDuration"
    for motion, wanted in (("reduce", "0s"), ("no-preference", "0.3s")):
        page = visit(reduced_motion=motion)
        expect(page.page.locator("#rank-1 .state")).to_have_text("alive")
        assert page.page.evaluate(duration) == wanted


# -- its judgement ---------------------------------------------------------------------------------------------------


def changed(rng: random.Random, answer: list[int]) -> list[int]:
    """A gap, a repeat, other tokens, or a shorter answer."""
    at, length = rng.randrange(len(answer)), rng.randrange(1, 20)
    match rng.randrange(5):
        case 0:
            return answer[:at] + answer[at + length :]
        case 1:
            return answer[:at] + answer[max(0, at - length) : at] + answer[at:]
        case 2:
            return [*answer[:at], *(rng.randrange(4) for _ in answer[at:])]
        case 3:
            return answer[:at]
        case _:
            return list(answer)


def test_the_page_judges_as_the_oracle_does(visit: Open) -> None:
    rng = random.Random(7)
    references = [
        [rng.randrange(4 + 500 * (i % 2)) for _ in range(rng.randrange(1, 120))] for i in range(400)
    ]
    pairs = [(reference, changed(rng, reference)) for reference in references]
    found = visit().page.evaluate(
        "async pairs => { const {compare} = await import('/ui/static/oracle.js');"
        " return JSON.stringify(pairs.map(([ref, got]) => compare(ref, got))); }",
        pairs,
    )
    wanted = [compare(reference, answer) for reference, answer in pairs]
    assert json.loads(found) == [
        {
            "identical": one.identical,
            "lost": one.tokens_lost,
            "duplicated": one.tokens_duplicated,
            "changed": one.tokens_changed,
            "first": one.first_difference,
        }
        for one in wanted
    ]
    assert 0 < sum(one.identical for one in wanted) < len(wanted)
