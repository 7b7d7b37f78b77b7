"""The oracle must see every kind of damage: an oracle that misses one would let a wrong recovery pass."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from ghostserve.testing.oracle import RESYNC_TOKENS, Verdict, compare, compare_choices

REFERENCE = random.Random(7).sample(range(1000), 200)


def counts(verdict: Verdict) -> tuple[int, int, int]:
    return verdict.tokens_lost, verdict.tokens_duplicated, verdict.tokens_changed


def test_equal_answers_are_identical() -> None:
    verdict = compare(REFERENCE, list(REFERENCE))
    assert verdict == Verdict(
        identical=True, tokens_lost=0, tokens_duplicated=0, tokens_changed=0, first_difference=None
    )


@pytest.mark.parametrize("at", [1, 50, 120, 199])
@pytest.mark.parametrize("length", [1, 5, 40])
def test_a_gap_is_lost(at: int, length: int) -> None:
    faulted = REFERENCE[:at] + REFERENCE[at + length :]
    verdict = compare(REFERENCE, faulted)
    assert not verdict.identical
    assert counts(verdict) == (min(length, 200 - at), 0, 0)
    assert verdict.first_difference == at


@pytest.mark.parametrize("at", [50, 120, 200])
@pytest.mark.parametrize("length", [1, 5, 40])
def test_a_repeat_is_duplicated(at: int, length: int) -> None:
    faulted = REFERENCE[:at] + REFERENCE[at - length : at] + REFERENCE[at:]
    verdict = compare(REFERENCE, faulted)
    assert counts(verdict) == (0, length, 0)
    assert verdict.first_difference == at


def test_a_repeat_in_an_answer_of_fixed_length_also_loses_the_end() -> None:
    faulted = (REFERENCE[:100] + REFERENCE[90:])[: len(REFERENCE)]
    assert counts(compare(REFERENCE, faulted)) == (10, 10, 0)


def test_a_repeat_that_the_end_cuts_off() -> None:
    faulted = REFERENCE[:180] + REFERENCE[160:180]
    assert counts(compare(REFERENCE, faulted)) == (20, 20, 0)


def test_one_changed_token() -> None:
    faulted = [*REFERENCE[:80], 5000, *REFERENCE[81:]]
    verdict = compare(REFERENCE, faulted)
    assert counts(verdict) == (0, 0, 1)
    assert verdict.first_difference == 80


def test_a_divergence_counts_as_changed_and_as_nothing_else() -> None:
    other = random.Random(8)
    faulted = REFERENCE[:100] + [other.randrange(1000) for _ in range(100)]
    lost, duplicated, changed = counts(compare(REFERENCE, faulted))
    assert (lost, duplicated) == (0, 0)
    assert changed >= 95


def test_what_was_never_sent_is_lost() -> None:
    verdict = compare(REFERENCE, REFERENCE[:150])
    assert counts(verdict) == (50, 0, 0)
    assert verdict.first_difference == 150


def test_nothing_came() -> None:
    assert counts(compare(REFERENCE, [])) == (200, 0, 0)


def test_tokens_beyond_the_end_are_changed() -> None:
    verdict = compare(REFERENCE, [*REFERENCE, 7777])
    assert counts(verdict) == (0, 0, 1)
    assert verdict.first_difference == 200


def test_degenerate_text_does_not_hide_a_change() -> None:
    reference = [1, 2] * 50
    faulted = [1, 2] * 25 + [2, 1] * 25
    verdict = compare(reference, faulted)
    assert not verdict.identical
    assert sum(counts(verdict)) > 0


def _damage(tokens: Sequence[int], rng: random.Random) -> list[int]:
    damaged = list(tokens)
    for _ in range(rng.randint(0, 3)):
        at, length = rng.randrange(len(damaged)), rng.randint(1, 12)
        damaged[at:at] = [damaged[at - 1]] * length if rng.random() < 0.5 else []
        if rng.random() < 0.5:
            del damaged[at : at + length]
        damaged = damaged or [0]
    return damaged


@pytest.mark.parametrize("seed", range(300))
def test_counts_are_zero_exactly_if_identical(seed: int) -> None:
    rng = random.Random(seed)
    reference = [rng.randrange(4) for _ in range(rng.randint(1, 60))]
    faulted = _damage(reference, rng)
    verdict = compare(reference, faulted)
    assert verdict.identical == (reference == faulted)
    assert (sum(counts(verdict)) == 0) == verdict.identical
    assert (verdict.first_difference is None) == verdict.identical
    assert len(faulted) <= len(reference) + verdict.tokens_duplicated + verdict.tokens_changed


def test_a_long_divergence_is_judged_quickly() -> None:
    rng = random.Random(9)
    reference = [rng.randrange(1000) for _ in range(4096)]
    faulted = [rng.randrange(1000) for _ in range(4096)]
    assert compare(reference, faulted).tokens_changed > 4000


def test_choices_are_summed_and_a_missing_one_is_lost() -> None:
    short = REFERENCE[: RESYNC_TOKENS * 2]
    verdict = compare_choices({0: short, 1: short}, {0: short})
    assert not verdict.identical
    assert counts(verdict) == (len(short), 0, 0)
    assert compare_choices({0: short, 1: short}, {1: short, 0: short}).identical
    assert not compare_choices({0: short, 1: []}, {0: short}).identical
