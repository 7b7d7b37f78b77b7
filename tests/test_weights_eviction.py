"""What gives way, and in which order: a pure function."""

from __future__ import annotations

import itertools

import pytest

from ghostserve.weights.eviction import Candidate, age_after, choose_victims, value_of_use


def candidate(entry: int, size_bytes: int, value: float, *, transient: bool = False) -> Candidate:
    return Candidate(entry=entry, size_bytes=size_bytes, value=value, transient=transient)


def chosen(candidates: list[Candidate], need_bytes: int) -> list[int] | None:
    choice = choose_victims(candidates, need_bytes=need_bytes).choice
    return None if choice is None else [victim.entry for victim in choice]


def test_the_least_valuable_goes_first() -> None:
    entries = [candidate(1, 10, 3.0), candidate(2, 10, 1.0), candidate(3, 10, 2.0)]
    assert chosen(entries, 10) == [2]
    assert chosen(entries, 11) == [2, 3]
    assert chosen(entries, 30) == [2, 3, 1]


@pytest.mark.parametrize("need_bytes", [0, -5])
def test_nothing_goes_where_there_is_room(need_bytes: int) -> None:
    assert chosen([candidate(1, 10, 1.0)], need_bytes) == []


def test_all_or_nothing() -> None:
    decision = choose_victims([candidate(1, 10, 1.0), candidate(2, 5, 2.0)], need_bytes=16)
    assert decision.choice is None
    assert decision.reason == "16 bytes are needed, 15 could be freed"


def test_file_images_go_before_all_others() -> None:
    assert chosen([candidate(1, 10, 1.0), candidate(2, 10, 9.0, transient=True)], 10) == [2]


def test_what_turns_out_not_to_be_needed_stays() -> None:
    """The small ones came first, and the large one alone would have done."""
    assert chosen([candidate(1, 1, 1.0), candidate(2, 2, 2.0), candidate(3, 100, 3.0)], 50) == [3]
    assert chosen([candidate(1, 1, 1.0), candidate(2, 60, 2.0), candidate(3, 100, 3.0)], 150) == [2, 3]


def test_equal_values_go_in_the_order_in_which_they_came() -> None:
    for order in itertools.permutations(
        [candidate(1, 10, 1.0), candidate(2, 10, 1.0), candidate(3, 10, 1.0)]
    ):
        assert chosen(list(order), 20) == [1, 2]


def test_value_is_what_a_byte_saves_for_each_use_above_the_age() -> None:
    assert value_of_use(age=5.0, uses=1, reload_cost_s=4.0, size_bytes=2) == 7.0
    assert value_of_use(age=5.0, uses=3, reload_cost_s=4.0, size_bytes=2) == 11.0
    assert value_of_use(age=5.0, uses=1, reload_cost_s=4.0, size_bytes=0) == 9.0


def test_age_rises_to_what_went_and_file_images_do_not_count() -> None:
    assert age_after(1.0, []) == 1.0
    assert age_after(1.0, [candidate(1, 1, 3.0), candidate(2, 1, 2.0)]) == 3.0
    assert age_after(1.0, [candidate(1, 1, 9.0, transient=True)]) == 1.0


def test_what_is_not_used_any_more_goes_in_the_end_however_costly_it_was() -> None:
    """Negative control: without ageing the costly one would stay for ever."""
    for ages, expected in ((True, True), (False, False)):
        age, gone = 0.0, False
        costly = candidate(1, 10, value_of_use(age=0.0, uses=1, reload_cost_s=50.0, size_bytes=10))
        other = candidate(2, 10, value_of_use(age=0.0, uses=1, reload_cost_s=1.0, size_bytes=10))
        for number in range(3, 200):
            victims = choose_victims([costly, other], need_bytes=10).choice
            assert victims is not None
            gone = victims[0].entry == costly.entry
            if gone:
                break
            age = age_after(age, victims) if ages else age
            other = candidate(number, 10, value_of_use(age=age, uses=1, reload_cost_s=1.0, size_bytes=10))
        assert gone is expected
