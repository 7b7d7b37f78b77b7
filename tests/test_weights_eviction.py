"""What gives way, and in which order: a pure function."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghostserve.weights.eviction import Candidate, choose_victims, worth

NOW_S = 100.0


def candidate(
    entry: int, size_bytes: int = 10, *, cost_s: float = 1.0, used_s: float = 0.0, transient: bool = False
) -> Candidate:
    return Candidate(
        entry=entry, size_bytes=size_bytes, reload_cost_s=cost_s, used_s=used_s, transient=transient
    )


def chosen(candidates: list[Candidate], need_bytes: int) -> list[int] | None:
    choice = choose_victims(candidates, need_bytes=need_bytes, now_s=NOW_S).choice
    return None if choice is None else [victim.entry for victim in choice]


def test_where_a_byte_costs_the_same_it_is_what_was_used_longest_ago() -> None:
    entries = [candidate(1, used_s=30), candidate(2, 20, cost_s=2.0, used_s=10), candidate(3, used_s=20)]
    assert chosen(entries, 10) == [2]
    assert chosen(entries, 21) == [2, 3]
    assert chosen(entries, 40) == [2, 3, 1]


def test_what_comes_from_further_away_stays_longer_but_not_for_ever() -> None:
    near, far = candidate(1, cost_s=1.0, used_s=NOW_S - 10), candidate(2, cost_s=8.0, used_s=NOW_S - 70)
    assert chosen([near, far], 10) == [1], "idle for 7 times as long, 8 times as dear"
    assert chosen([near, candidate(2, cost_s=8.0, used_s=NOW_S - 90)], 10) == [2]


@pytest.mark.parametrize("need_bytes", [0, -5])
def test_nothing_goes_where_there_is_room(need_bytes: int) -> None:
    assert chosen([candidate(1)], need_bytes) == []


def test_all_or_nothing() -> None:
    decision = choose_victims([candidate(1, 10), candidate(2, 5)], need_bytes=16, now_s=NOW_S)
    assert decision.choice is None
    assert decision.reason == "16 bytes are needed, 15 could be freed"


def test_file_images_go_before_all_others() -> None:
    assert chosen([candidate(1), candidate(2, used_s=99.0, cost_s=9.0, transient=True)], 10) == [2]


def test_what_turns_out_not_to_be_needed_stays() -> None:
    """The small ones came first, and the large one alone would have done."""
    small = [candidate(1, 1, cost_s=0.1, used_s=10), candidate(2, 2, cost_s=0.2, used_s=20)]
    assert chosen([*small, candidate(3, 100, cost_s=10.0, used_s=30)], 50) == [3]


def test_equal_ones_go_in_the_order_in_which_they_came() -> None:
    for order in itertools.permutations([candidate(1), candidate(2), candidate(3)]):
        assert chosen(list(order), 20) == [1, 2]


def test_no_use_of_the_future_and_no_size_breaks_it() -> None:
    assert worth(candidate(1, used_s=NOW_S + 5), now_s=NOW_S) > worth(candidate(1, used_s=99.0), now_s=NOW_S)
    assert worth(candidate(1, 0), now_s=NOW_S) == 0.01


entries = st.lists(
    st.tuples(st.integers(1, 50), st.floats(0, 10), st.floats(0, NOW_S), st.booleans()), max_size=8
)


@given(entries, st.integers(-5, 200))
def test_enough_goes_none_of_it_needlessly_and_all_or_nothing(
    drawn: list[tuple[int, float, float, bool]], need_bytes: int
) -> None:
    candidates = [
        candidate(number, size, cost_s=cost_s, used_s=used_s, transient=transient)
        for number, (size, cost_s, used_s, transient) in enumerate(drawn)
    ]
    victims = choose_victims(candidates, need_bytes=need_bytes, now_s=NOW_S).choice
    if victims is None:
        assert sum(one.size_bytes for one in candidates) < need_bytes
        return
    freed_bytes = sum(one.size_bytes for one in victims)
    assert len({one.entry for one in victims}) == len(victims)
    assert freed_bytes >= need_bytes
    assert all(freed_bytes - one.size_bytes < need_bytes for one in victims)
