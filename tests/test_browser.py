"""The page in a real browser, over the stand-in server: what it says after a kill, and that everybody can use it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from browser_kit import (
    WIDE,
    MortalServer,
    PacedServer,
    Visit,
    chromium_or_not_run,
    mortal_server,
    paced_server,
)
from ghostserve.arena.names import Switch
from ghostserve.testing.oracle import compare

pytestmark = [pytest.mark.long, pytest.mark.timeout(120)]
Open = Callable[..., Visit]
FAST = ("--token-s", "0.001")
FIRST_TOKENS = 40


@pytest.fixture(scope="module")
def running() -> Iterator[Browser]:
    with chromium_or_not_run() as browser:
        yield browser


@pytest.fixture(scope="module")
def server() -> Iterator[PacedServer]:
    with paced_server() as server:
        yield server


@pytest.fixture(scope="module", autouse=True)
def mortals() -> Iterator[tuple[MortalServer, MortalServer]]:
    """One to be restarted, one that ends at a loss; they start while other tests run."""
    with (
        mortal_server(*FAST) as first,
        mortal_server("--token-s", "0.02", "--exit-code-at-loss", "4") as second,
    ):
        yield first, second


@pytest.fixture
def visit(running: Browser, server: PacedServer) -> Iterator[Open]:
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
def unrestored(server: PacedServer) -> Iterator[None]:
    """The negative control: what follows a loss is other text."""
    server.engine.set_switch(Switch.SKIP_RESTORE, True)
    yield
    server.engine.set_switch(Switch.SKIP_RESTORE, False)


def ask_up_to(page: Visit, server: PacedServer, *, tokens: int = 150) -> None:
    """An answer that waits after its first tokens for somebody to be killed."""
    page.shows("#rank-1 .state", "alive")
    server.engine.pause_after(FIRST_TOKENS)
    page.ask(tokens)
    page.wait_pieces(FIRST_TOKENS)


def kill_in_mid_answer(page: Visit, server: PacedServer) -> None:
    ask_up_to(page, server)
    page.page.get_by_role("button", name="Kill rank 1").click()


# -- what it says ----------------------------------------------------------------------------------------------------


def test_a_kill_in_mid_answer(visit: Open, server: PacedServer) -> None:
    page = visit()
    page.shows("#state", "serving")
    before = page.page.locator("#rank-1 dd").first.inner_text()
    page.page.evaluate(
        "() => { window.said = []; new MutationObserver(() => window.said.push("
        "document.getElementById('outcome').textContent)).observe(document.getElementById('outcome'), {childList: true}); }"
    )
    server.engine.may_replace.clear()
    kill_in_mid_answer(page, server)
    page.outcome("recovering…")
    server.engine.may_replace.set()
    line = page.outcome("✓")
    assert line.endswith("ms · 0 lost · 0 duplicated · identical ✓")
    assert line.startswith("recovered in ")
    outage_ms = float(line.split()[2])
    assert 100 <= outage_ms < 5000  # the stand-in takes 100, and waits for the page
    assert page.page.locator(".struck").inner_text() == "✗ rank 1 killed"
    assert page.page.locator("#rank-1 dd").first.inner_text() != before
    phases = page.page.locator("#phases li").all_inner_texts()
    assert [text.split()[0] for text in phases] == [
        "detect", "fence", "leave", "spawn", "regroup", "weights", "state", "kv", "retry"
    ]  # fmt: skip
    # A screen reader hears a few sentences, not each token.
    assert len(page.page.evaluate("() => window.said")) <= 6


def test_a_difference_is_red(visit: Open, server: PacedServer, unrestored: None) -> None:
    """The negative control of the test above."""
    page = visit()
    kill_in_mid_answer(page, server)
    line = page.outcome("NOT identical ✗")
    assert "changed" in line
    assert "✓" not in line
    expect(page.page.locator("#outcome")).to_have_class("bad")
    assert page.page.locator(".differs").count() > 0
    assert page.barriers() == {}


def test_an_answer_without_a_failure(visit: Open) -> None:
    page = visit()
    page.ask(40)
    assert page.outcome("✓") == "nobody failed while it streamed · 0 lost · 0 duplicated · identical ✓"


def test_a_loss_while_nothing_is_asked_for_is_told(visit: Open, server: PacedServer) -> None:
    page, other = visit(), visit()
    page.shows("#rank-0 .state", "alive")
    kill_in_mid_answer(other, server)
    page.outcome("while nothing was asked for")
    other.outcome("✓")


def test_stop_ends_the_answer(visit: Open, server: PacedServer) -> None:
    page = visit()
    ask_up_to(page, server)
    page.page.get_by_role("button", name="Stop").click()
    page.outcome("stopped; nothing was compared")
    server.engine.pause_after(math.inf)
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
    with paced_server(event_log=False) as silent:
        page = visit(silent.url)
        silent.engine.may_replace.clear()
        kill_in_mid_answer(page, silent)
        page.outcome("recovering…")
        silent.engine.may_replace.set()
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
    with paced_server() as fresh:
        page = visit(fresh.url)
        kill_in_mid_answer(page, fresh)
        page.outcome("✓")
        for kind in ("rank_lost", "rank_taken", "recovery_ended"):
            expect(page.page.locator(f"#events li[data-kind={kind}]")).to_be_visible()
        kinds = page.page.locator("#events li").evaluate_all("all => all.map(one => one.dataset.kind)")
        # Once: nothing is derived beside it.
        assert kinds.count("recovery_ended") == kinds.count("rank_taken") == kinds.count("rank_lost") == 1


def test_other_faults_are_sent(visit: Open) -> None:
    page = visit()
    page.shows("#rank-0 .state", "alive")
    page.page.locator("#rank-0 summary").click()
    for name, body in (
        ("Slow rank 0", {"rank": 0, "how": "slow", "factor": 5, "steps": 100}),
        ("Corrupt rank 0", {"rank": 0, "how": "corrupt"}),
    ):
        with page.page.expect_request("**/ghostserve/kill") as request:
            page.page.get_by_role("button", name=name).click()
        assert request.value.post_data_json == body
    page.shows("#notice", "bits of its KV flipped")


def test_what_other_answers_to_a_loss_cost(visit: Open) -> None:
    """With an admin key, so that all which this sends is seen to carry it."""
    with paced_server(token_s=0.004, outage_s=0.5, restart_s=0.6, admin_key="chief") as slow:
        page = visit(slow.url)
        page.page.evaluate("() => sessionStorage.setItem('ghostserve-admin-key', 'chief')")
        kill_in_mid_answer(page, slow)
        page.outcome("✓")
        values = page.page.locator("#costs .value")
        assert values.all_inner_texts()[1:] == ["not measured", "not measured"]
        page.page.get_by_role("button", name="Measure").click()
        page.shows("#costs li:nth-child(3) .value", "starting", seconds=30)
        recomputed = values.nth(1).inner_text()
        # The stand-in takes 500, less what passes until the first look.
        assert float(recomputed.removesuffix(" ms")) >= 450
        page.shows("#costs li:nth-child(3) .value", "600 ms")
        assert page.barriers() == {}
        page.page.reload()
        page.shows("#costs li:nth-child(2) .value", recomputed)
        page.shows("#costs li:nth-child(3) .value", "600 ms")


# -- whom it survives ------------------------------------------------------------------------------------------------


def test_a_restart_of_the_server(visit: Open, mortals: tuple[MortalServer, MortalServer]) -> None:
    mortal, _ = mortals
    mortal.wait()
    page = visit(mortal.url)
    page.shows("#state", "serving")
    pid = page.page.locator("#rank-0 dd").first.inner_text()
    assert mortal.stop() < 3  # the page that watches does not hold it up
    page.shows("#state", "reconnecting…")
    assert page.barriers() == {}
    mortal.start()
    page.shows("#state", "serving")
    page.shows("#rank-0 dd", pid, absent=True)
    page.ask(20)
    page.outcome("✓")


def test_a_server_that_goes_in_mid_answer(visit: Open, mortals: tuple[MortalServer, MortalServer]) -> None:
    _, mortal = mortals
    mortal.wait()
    page = visit(mortal.url)
    page.shows("#rank-1 .state", "alive")
    page.ask(150)
    page.wait_tokens(10)
    page.page.get_by_role("button", name="Kill rank 1").click()
    page.outcome("the answer broke: ")
    page.shows("#state", "reconnecting…")
    assert page.barriers() == {}
    mortal.start()
    page.shows("#state", "serving")
    page.ask(20)
    page.outcome("✓")


def test_the_key_is_asked_for(visit: Open) -> None:
    with paced_server(api_keys=("right",)) as keyed:
        page = visit(keyed.url)
        page.shows("#state", "wants a key")
        field = page.page.get_by_label("This server wants its API key")
        expect(field).to_be_focused()
        assert page.barriers() == {}
        field.fill("wrong")
        page.page.keyboard.press("Enter")
        expect(field).to_be_visible()
        field.fill("right")
        page.page.keyboard.press("Enter")
        page.shows("#state", "serving")
        expect(field).to_be_hidden()
        kill_in_mid_answer(page, keyed)
        page.outcome("✓")


@pytest.mark.parametrize("api_keys", [(), ("right",)], ids=["without API keys", "with API keys"])
def test_faults_want_the_admin_key(visit: Open, api_keys: tuple[str, ...]) -> None:
    """By the keyboard alone. Faults carry the admin key, and nothing else does."""
    with paced_server(api_keys=api_keys, admin_key="chief") as guarded:
        page = visit(guarded.url)
        carried: dict[str, str | None] = {}
        page.page.on(
            "request",
            lambda sent: carried.update({sent.url.split("/")[-1]: sent.headers.get("authorization")}),
        )
        press, kill = page.page.keyboard, page.page.get_by_role("button", name="Kill rank 1")
        if api_keys:
            page.shows("#state", "wants a key")
            press.type("right")
            press.press("Enter")
        ask_up_to(page, guarded)
        kill.press("Enter")
        page.shows("#notice", "not done: faults on this server want its admin key; enter it")
        expect(page.page.get_by_label("Admin key")).to_be_focused()
        assert guarded.engine.losses == 0
        assert page.barriers() == {}
        for key, answer in (
            ("wrong", "not done: the server refused this admin key"),
            ("chief", "was killed"),
        ):
            press.type(key)
            press.press("Enter")
            expect(kill).to_be_focused()
            press.press("Enter")
            page.shows("#notice", answer)
        expect(page.page.get_by_label("Admin key")).to_be_hidden()
        page.outcome("✓")
        assert carried["kill"] == "Bearer chief"
        assert carried["completions"] == carried["status"] == ("Bearer right" if api_keys else None)
        assert "chief" not in page.page.url + page.page.evaluate(
            "() => JSON.stringify(localStorage) + document.cookie"
        )


def test_without_fault_injection_it_is_explained(visit: Open) -> None:
    with paced_server(fault_injection=False) as calm:
        page = visit(calm.url)
        page.shows("#state", "serving")
        expect(page.page.get_by_text("--enable-fault-injection")).to_be_visible()
        assert page.page.get_by_role("button", name="Kill rank 0").count() == 0
        assert page.barriers() == {}


# -- who can use it --------------------------------------------------------------------------------------------------


def test_no_barrier_in_any_state(visit: Open) -> None:
    """Light and dark, wide and narrow. Other states are looked at in the tests that reach them."""
    found = {}
    with paced_server() as fresh:
        page = visit(fresh.url)
        page.shows("#rank-1 .state", "alive")
        found["idle"] = page.barriers()
        page.page.locator("#rank-1 summary").click()
        found["menu"] = page.barriers()
        ask_up_to(page, fresh)
        found["streaming"] = page.barriers()
        fresh.engine.may_replace.clear()
        page.page.get_by_role("button", name="Kill rank 1").click()
        page.outcome("recovering…")
        page.shows("#rank-1 .state", "lost")
        found["recovering"] = page.barriers()
        fresh.engine.may_replace.set()
        page.outcome("✓")
        found["recovered"] = page.barriers()
    assert {state: barriers for state, barriers in found.items() if barriers} == {}


def test_the_barrier_check_can_fail(visit: Open) -> None:
    """The negative control of the check by axe-core."""
    page = visit()
    page.shows("#state", "serving")
    page.page.evaluate(
        "() => { document.body.append(document.createElement('button'));"
        " document.getElementById('outcome').style.color = 'var(--line)';"
        " document.getElementById('count').style.width = '400px'; }"
    )
    found = page.barriers()
    assert set(found) == {"wide light", "wide dark", "narrow light", "narrow dark"}
    for flaws in found.values():
        assert {"button-name", "color-contrast"} <= {flaw.split(":")[0] for flaw in flaws}
    assert found["narrow dark"][-1].endswith("pixels wide")


def test_the_keyboard_is_enough(visit: Open, server: PacedServer) -> None:
    """Each control in its order, and the whole way from the prompt to the verdict without a mouse."""
    page = visit()
    page.shows("#rank-1 .state", "alive")
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
    server.engine.pause_after(FIRST_TOKENS)
    page.page.keyboard.press("Enter")
    page.wait_pieces(FIRST_TOKENS)
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
    moving = (
        "() => [...document.querySelectorAll('*')].filter(one => { const style = getComputedStyle(one);"
        " return parseFloat(style.transitionDuration) || style.animationName !== 'none'"
        " || style.scrollBehavior === 'smooth'; }).length"
    )
    page = visit()
    page.shows("#rank-1 .state", "alive")
    assert page.page.evaluate(moving) > 0
    page.page.emulate_media(reduced_motion="reduce")
    assert page.page.evaluate(moving) == 0


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
