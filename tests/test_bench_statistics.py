"""The figures of the benches: medians, intervals, judgements and gaps, from samples with known answers."""

from __future__ import annotations

import random

import estimates
import outage
import overhead
import pytest
import results
import streams


def test_an_interval_holds_the_median_and_narrows_with_more_values() -> None:
    def of(count: int) -> estimates.Estimate:
        rng = random.Random(5)
        return estimates.estimate_median([rng.gauss(1.0, 0.1) for _ in range(count)], rng=rng)

    few, many = of(8), of(200)
    for found in (few, many):
        assert found.low <= found.median <= found.high
        assert found.low < 1.0 < found.high
    assert many.width < few.width / 2


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (0.90, 0.94, estimates.Judgement.MISSED),
        (0.94, 0.97, estimates.Judgement.NOT_RESOLVED),
        (0.96, 1.02, estimates.Judgement.MET),
        (0.96, 1.20, estimates.Judgement.NOT_RESOLVED),
    ],
)
def test_a_wide_interval_is_never_a_success(low: float, high: float, says: estimates.Judgement) -> None:
    estimate = estimates.Estimate(median=(low + high) / 2, low=low, high=high, count=10)
    assert estimates.judge_ratio(estimate, at_least=0.95).choice is says


@pytest.mark.parametrize(
    ("low", "high", "us", "says"),
    [
        (1.9, 2.3, -9000, estimates.Judgement.MET),  # twice as fast, however wide the interval is
        (0.90, 0.93, 140, estimates.Judgement.MET),  # a short step: 140 us are much of it, and allowed
        (0.90, 0.93, 160, estimates.Judgement.MISSED),
        (0.90, 1.30, 160, estimates.Judgement.NOT_RESOLVED),
    ],
)
def test_a_target_in_shares_or_in_microseconds(
    low: float, high: float, us: float, says: estimates.Judgement
) -> None:
    ratio = estimates.Estimate(median=(low + high) / 2, low=low, high=high, count=7)
    difference = estimates.Estimate(median=us - 10, low=us - 20, high=us, count=7)
    assert estimates.judge_cost(ratio, difference, at_least=0.97, or_at_most=150).choice is says
    wide = estimates.Estimate(median=us - 10, low=us - 9000, high=us, count=7)
    says_of_wide = estimates.judge_cost(ratio, wide, at_least=0.97, or_at_most=150).choice
    assert says_of_wide is estimates.judge_ratio(ratio, at_least=0.97).choice


def test_too_few_values_resolve_nothing() -> None:
    estimate = estimates.Estimate(median=1.0, low=0.99, high=1.01, count=2)
    assert estimates.judge_ratio(estimate, at_least=0.95).choice is estimates.Judgement.NOT_RESOLVED


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        estimates.spread_of([])


def test_the_spread_of_known_values() -> None:
    spread = estimates.spread_of([float(value) for value in range(1, 101)])
    assert (spread.median, spread.p95, spread.minimum, spread.maximum) == (50.5, 95.0, 1.0, 100.0)


def test_a_step_gives_every_stream_a_token() -> None:
    begun = [
        streams.TimedStream(token_ids=(1,) * 11, arrivals_s=tuple(s + i / 10 for i in range(11)))
        for s in (0, 0)
    ]
    rate = streams.rate_of(begun)
    assert rate.tokens_per_s == pytest.approx(20.0)
    assert rate.step_us == pytest.approx(100_000)
    assert (rate.gap_p50_us, rate.gap_p99_us) == pytest.approx((100_000, 100_000))


def test_streams_that_never_ran_together_have_no_rate() -> None:
    one = streams.TimedStream(token_ids=(1, 2), arrivals_s=(0.0, 1.0))
    late = streams.TimedStream(token_ids=(1, 2), arrivals_s=(5.0, 6.0))
    with pytest.raises(Exception, match="same time"):
        streams.rate_of([one, late])


def test_overhead_compares_within_a_round() -> None:
    """A machine that slows down from round to round changes no ratio."""
    samples = [
        overhead.Sample(
            round=number,
            place=0,
            variant=letter,
            streams=1,
            tokens_per_s=speed / (number + 1),
            step_us=1.0,
            gap_p50_us=0.0,
            gap_p99_us=0.0,
            others_cpu_percent=0.0,
        )
        for number in range(6)
        for letter, speed in (("a", 98.0), ("c", 100.0))
    ]
    pair = overhead.Pair(over="a", under="c", meaning="", at_least=0.95)
    ratio, _ = overhead.compare(samples, pair, streams=1, rng=random.Random(1))
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((0.98, 0.98, 0.98))


def test_an_outage_is_the_longest_wait_after_the_kill() -> None:
    killed: list[bool] = []
    watch = outage._Stopwatch(lambda: killed.append(True))
    now_s = 0.0
    for token in range(outage.TOKENS_BEFORE + 4):
        # A slow start before the kill; one token that was on its way; then the outage.
        now_s += {0: 9.0, outage.TOKENS_BEFORE + 1: 2.0}.get(token, 0.01)
        watch(0, (token,), "", now_s)
    assert killed == [True]
    assert watch.outage_s == pytest.approx(2.0)


def test_outage_rows_and_their_ratio() -> None:
    samples = [
        outage.Sample(
            round=number,
            method=method,
            context=256,
            outage_s=seconds,
            identical=True,
            path=outage.PATHS.get(method, method),
            phases_ms=phases,
        )
        for method, seconds, phases in (("standby", 2.0, {"spawn": 500.0}), ("restart", 30.0, {}))
        for number in range(3)
    ]
    rows = outage.summarise(samples, contexts=[256, 4096], seed=1)
    assert [(row["method"], row["median"]) for row in rows] == [("standby", 2.0), ("restart", 30.0)]
    text = outage.markdown(rows)
    assert "15.0x" in text
    assert "| 256 tokens, standby | 500 (500) |" in text


def test_results_name_no_place_and_overwrite_nothing() -> None:
    text = results.redact("/somewhere/repo/x on box-17", {"/somewhere/repo": "REPOSITORY", "box-17": "HOST"})
    assert text == "REPOSITORY/x on HOST"
    assert results.unused_stem("overhead-d", {"overhead-d", "overhead-d-2"}) == "overhead-d-3"
