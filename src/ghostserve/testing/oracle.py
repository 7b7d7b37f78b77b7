"""The one oracle: the tokens with faults are the tokens without. Pure; knows no server.

What is counted. Both answers are read from the left; at each difference the smallest explanation is taken:

    reference  a b c d e f g h ...        reference  a b c d e f ...        reference  a b c d e ...
    faulted    a b     e f g h ...        faulted    a b a b c d ...        faulted    a b x d e ...
                   lost 2                                duplicated 2                      changed 1

A gap or a repeat counts as one only if the answers agree again for RESYNC_TOKENS behind it, or to the end
of both (or, for a repeat, if the faulted answer ends in it): an agreement of one or two tokens is chance,
and after a real divergence nothing but `changed` should grow. What is left of the reference at the end is
lost. What is left of the faulted answer at the end is duplicated if it repeats the tokens right before it,
otherwise changed.

The counts describe; the judgement is `identical`, which is plain equality. All counts are zero exactly if
it holds. `web/static/oracle.js` holds the same definition for the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

RESYNC_TOKENS = 8
SHIFT_TOKENS_MAX = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How a faulted answer differs from the reference; `first_difference` is an index, None if there is
    none.
    """

    identical: bool
    tokens_lost: int
    tokens_duplicated: int
    tokens_changed: int
    first_difference: int | None


def _agree(left: Sequence[int], right: Sequence[int], *, left_at: int, right_at: int) -> bool:
    """Whether two answers go on alike from here: for RESYNC_TOKENS tokens, or both to their end."""
    left_rest, right_rest = len(left) - left_at, len(right) - right_at
    if min(left_rest, right_rest) < RESYNC_TOKENS and left_rest != right_rest:
        return False
    length = min(left_rest, RESYNC_TOKENS)
    return length > 0 and left[left_at : left_at + length] == right[right_at : right_at + length]


def _repeat(reference: Sequence[int], faulted: Sequence[int], *, ref_at: int, got_at: int, shift: int) -> int:
    """How many tokens from `got_at` on say again what was said `shift` tokens before; 0 if that explains
    nothing.
    """
    length = min(shift, len(faulted) - got_at)
    if faulted[got_at : got_at + length] != faulted[got_at - shift : got_at - shift + length]:
        return 0
    cut_off = got_at + length == len(faulted) and length >= RESYNC_TOKENS
    return length if cut_off or _agree(reference, faulted, left_at=ref_at, right_at=got_at + length) else 0


def _explain(
    reference: Sequence[int], faulted: Sequence[int], *, ref_at: int, got_at: int
) -> tuple[int, int]:
    """The smallest (lost, duplicated) that explains a difference here; (0, 0) if neither does."""
    token = faulted[got_at]
    ahead, behind = len(reference) - ref_at, got_at
    # One token is compared before anything else: this loop runs at each changed position.
    for shift in range(1, min(SHIFT_TOKENS_MAX, max(ahead, behind)) + 1):
        gap_starts = shift < ahead and reference[ref_at + shift] == token
        if gap_starts and _agree(reference, faulted, left_at=ref_at + shift, right_at=got_at):
            return shift, 0
        if shift <= behind and faulted[got_at - shift] == token:
            repeated = _repeat(reference, faulted, ref_at=ref_at, got_at=got_at, shift=shift)
            if repeated:
                return 0, repeated
    return 0, 0


def _repeated_at_end(faulted: Sequence[int], got_at: int) -> bool:
    rest = len(faulted) - got_at
    return rest <= got_at and faulted[got_at:] == faulted[got_at - rest : got_at]


def compare(reference: Sequence[int], faulted: Sequence[int]) -> Verdict:
    """Judge the token ids of one answer against those of the failure-free one."""
    reference, faulted = list(reference), list(faulted)
    lost = duplicated = changed = ref_at = got_at = 0
    first_difference: int | None = None
    while ref_at < len(reference) and got_at < len(faulted):
        if reference[ref_at] == faulted[got_at]:
            ref_at, got_at = ref_at + 1, got_at + 1
            continue
        if first_difference is None:
            first_difference = got_at
        gap, repeat = _explain(reference, faulted, ref_at=ref_at, got_at=got_at)
        if gap or repeat:
            lost, duplicated = lost + gap, duplicated + repeat
            ref_at, got_at = ref_at + gap, got_at + repeat
        else:
            changed, ref_at, got_at = changed + 1, ref_at + 1, got_at + 1
    lost += len(reference) - ref_at
    rest = len(faulted) - got_at
    if rest and _repeated_at_end(faulted, got_at):
        duplicated += rest
    else:
        changed += rest
    if first_difference is None and len(reference) != len(faulted):
        first_difference = min(len(reference), len(faulted))
    return Verdict(
        identical=reference == faulted,
        tokens_lost=lost,
        tokens_duplicated=duplicated,
        tokens_changed=changed,
        first_difference=first_difference,
    )


def compare_choices(reference: Mapping[int, Sequence[int]], faulted: Mapping[int, Sequence[int]]) -> Verdict:
    """Judge all choices of one request; counts are summed, `first_difference` is the earliest."""
    verdicts = [
        compare(reference.get(index, ()), faulted.get(index, ())) for index in sorted({*reference, *faulted})
    ]
    firsts = [verdict.first_difference for verdict in verdicts if verdict.first_difference is not None]
    return Verdict(
        identical=reference.keys() == faulted.keys() and all(verdict.identical for verdict in verdicts),
        tokens_lost=sum(verdict.tokens_lost for verdict in verdicts),
        tokens_duplicated=sum(verdict.tokens_duplicated for verdict in verdicts),
        tokens_changed=sum(verdict.tokens_changed for verdict in verdicts),
        first_difference=min(firsts, default=None),
    )
