"""The books of the pool, each rule by itself, and all of them under anything that clients may do."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from ghostserve.weights.pool_book import LATE_S, PINS_MAX, PoolBook
from ghostserve.weights.pool_layout import ALIGNMENT_BYTES, total_bytes
from ghostserve.weights.pool_types import (
    Action,
    EntryState,
    Free,
    GiveFollow,
    GiveHit,
    GiveLease,
    Image,
    ImageKind,
    Refusal,
    Refuse,
)

UNIT = total_bytes(1)  # what the smallest entry is charged


def image(
    key: str, *, nbytes: int = 1, kind: str = "rank", label: str = "", cost_s: float = 1.0, readers: int = 1
) -> Image:
    return Image(
        key=key,
        nbytes=nbytes,
        kind=ImageKind(kind),
        label=label or f"model-{key}",
        reload_cost_s=cost_s,
        readers=readers,
    )


class Desk:
    """A book with what the server would do with its answers: which client holds what, which memory there is."""

    def __init__(self, budget_bytes: int = 10 * UNIT) -> None:
        self.book = PoolBook(budget_bytes=budget_bytes)
        self.now_s = 0.0
        self.free_bytes: int | None = None

    def open(self, client: int, wanted: Image) -> list[Action]:
        self.now_s += 1
        return self.book.open(client, wanted, free_bytes=self.free_bytes, now_s=self.now_s)

    def leave(self, client: int) -> list[Action]:
        self.now_s += 1
        return self.book.leave(client, free_bytes=self.free_bytes, now_s=self.now_s)

    def publish(self, client: int, *, meta_bytes: int = 0) -> list[Action]:
        self.now_s += 1
        return self.book.publish(client, meta_bytes=meta_bytes, now_s=self.now_s)

    def use(self, client: int, wanted: Image) -> None:
        """Get what is there and let go of it."""
        assert [type(action) for action in self.open(client, wanted)] == [GiveHit]
        self.leave(client)

    def put(self, client: int, wanted: Image) -> None:
        """Publish an image and let go of it."""
        actions = self.open(client, wanted)
        assert isinstance(actions[-1], GiveLease), actions
        self.publish(client)
        self.leave(client)

    def names(self) -> list[str]:
        return [entry.key for entry in self.book.entries()]


@pytest.fixture
def desk() -> Desk:
    return Desk()


# ---- lease, follow, hit ----------------------------------------------------------------------------------------------


def test_the_first_gets_a_lease_and_the_next_follow_it(desk: Desk) -> None:
    assert desk.open(1, image("a")) == [GiveLease(client=1, entry=1)]
    assert desk.open(2, image("a")) == [GiveFollow(client=2, entry=1)]
    assert desk.open(3, image("b")) == [GiveLease(client=3, entry=2)]
    assert desk.book.lease_of(1) == (1, image("a"))
    assert desk.book.lease_of(2) is None
    assert desk.book.lease_of(9) is None


def test_publishing_turns_the_lease_and_all_who_follow_into_references(desk: Desk) -> None:
    for client in (1, 2, 3):
        desk.open(client, image("a"))
    assert desk.publish(1) == [GiveHit(client=client, entry=1) for client in (1, 2, 3)]
    assert desk.open(4, image("a")) == [GiveHit(client=4, entry=1)]
    (entry,) = desk.book.entries()
    assert (entry.state, entry.references, entry.uses) == (EntryState.PUBLISHED, 4, 4)
    counts = desk.book.counts[ImageKind.RANK]
    assert (counts.misses, counts.follows, counts.hits, counts.published) == (1, 2, 3, 1)


def test_an_abandoned_lease_goes_to_the_next_waiter_on_new_memory(desk: Desk) -> None:
    for client in (1, 2, 3):
        desk.open(client, image("a"))
    assert desk.leave(1) == [
        Free(entry=1, abandoned=True),
        GiveLease(client=2, entry=2),
        GiveFollow(client=3, entry=2),
    ]
    assert desk.leave(2) == [Free(entry=2, abandoned=True), GiveLease(client=3, entry=3)]
    assert desk.leave(3) == [Free(entry=3, abandoned=True)]
    assert desk.book.idle
    assert desk.names() == []
    assert desk.book.counts[ImageKind.RANK].abandoned == 3


def test_a_follower_that_leaves_is_not_next(desk: Desk) -> None:
    for client in (1, 2, 3):
        desk.open(client, image("a"))
    assert desk.leave(2) == []
    assert desk.leave(1)[1:] == [GiveLease(client=3, entry=2)]


def test_what_was_published_stays_when_its_users_leave(desk: Desk) -> None:
    desk.put(1, image("a"))
    assert desk.names() == ["a"]
    assert desk.book.idle
    assert desk.open(2, image("a")) == [GiveHit(client=2, entry=1)]
    assert not desk.book.idle


def test_leaving_with_nothing_is_nothing(desk: Desk) -> None:
    assert desk.leave(7) == []


@pytest.mark.parametrize("other", [image("a", nbytes=2), image("a", kind="file")])
def test_a_key_means_one_thing(desk: Desk, other: Image) -> None:
    desk.open(1, image("a"))
    (refusal,) = desk.open(2, other)
    assert isinstance(refusal, Refuse)
    assert refusal.why is Refusal.OTHER
    assert "its key belongs to a rank image of 1 bytes" in refusal.reason
    assert not desk.book.holds(2)


# ---- budget and memory -----------------------------------------------------------------------------------------------


def test_the_least_valuable_makes_room(desk: Desk) -> None:
    desk.book.set_budget(2 * UNIT, now_s=99.0)
    desk.put(1, image("cheap", cost_s=1.0))
    desk.put(2, image("costly", cost_s=9.0))
    assert desk.open(3, image("new")) == [Free(entry=1), GiveLease(client=3, entry=3)]
    assert desk.book.counts[ImageKind.RANK].evictions == 1


def test_what_is_used_filled_or_pinned_is_not_evicted(desk: Desk) -> None:
    desk.book.set_budget(3 * UNIT, now_s=99.0)
    desk.put(1, image("pinned"))
    desk.book.pin("model-pinned")
    desk.put(2, image("used"))
    desk.open(2, image("used"))
    desk.open(3, image("filling"))
    (refusal,) = desk.open(4, image("new"))
    assert isinstance(refusal, Refuse)
    assert refusal.why is Refusal.IN_USE
    assert "--weights-memory" in refusal.reason
    assert desk.names() == ["pinned", "used", "filling"]
    desk.leave(2)
    assert desk.open(4, image("new")) == [Free(entry=2), GiveLease(client=4, entry=4)]


def test_more_than_the_whole_pool_is_refused_at_once_and_evicts_nothing(desk: Desk) -> None:
    desk.put(1, image("a"))
    (refusal,) = desk.open(2, image("huge", nbytes=11 * UNIT))
    assert isinstance(refusal, Refuse)
    assert refusal.why is Refusal.TOO_LARGE
    assert "more than the whole pool has" in refusal.reason
    assert desk.names() == ["a"]
    assert desk.book.refusals[Refusal.TOO_LARGE] == 1


def test_a_lease_that_leaves_the_machine_too_little_evicts_or_is_refused(desk: Desk) -> None:
    desk.put(1, image("a"))
    desk.free_bytes = 0
    assert desk.open(2, image("b")) == [Free(entry=1), GiveLease(client=2, entry=2)]
    (refusal,) = desk.open(3, image("c"))
    assert isinstance(refusal, Refuse)
    assert refusal.why is Refusal.MEMORY
    assert "too little memory" in refusal.reason
    desk.free_bytes = UNIT
    assert desk.open(3, image("c")) == [GiveLease(client=3, entry=3)]


def test_what_a_dead_filler_had_counts_as_free_for_its_successor(desk: Desk) -> None:
    desk.open(1, image("a"))
    desk.open(2, image("a"))
    desk.free_bytes = 0
    assert desk.leave(1) == [Free(entry=1, abandoned=True), GiveLease(client=2, entry=2)]


def test_a_successor_without_memory_is_refused_with_all_who_follow(desk: Desk) -> None:
    for client in (1, 2, 3):
        desk.open(client, image("a"))
    desk.free_bytes = -UNIT
    free, *refusals = desk.leave(1)
    assert free == Free(entry=1, abandoned=True)
    assert [one.client for one in refusals if isinstance(one, Refuse)] == [2, 3]
    assert desk.book.idle


def test_memory_that_cannot_be_had_refuses_the_lease_and_its_followers(desk: Desk) -> None:
    desk.open(1, image("a"))
    desk.open(2, image("a"))
    free, *refusals = desk.book.no_memory(1, "none")
    assert free == Free(entry=1, abandoned=True)
    assert [(one.client, one.reason) for one in refusals if isinstance(one, Refuse)] == [
        (1, "none"),
        (2, "none"),
    ]
    assert desk.names() == []
    assert desk.book.idle


def test_meta_is_charged_and_refused_where_it_does_not_fit(desk: Desk) -> None:
    desk.book.set_budget(UNIT + 100, now_s=99.0)
    desk.open(1, image("a"))
    desk.open(2, image("a"))
    free, *refusals = desk.publish(1, meta_bytes=101)
    assert free == Free(entry=1, abandoned=True)
    assert [one.client for one in refusals if isinstance(one, Refuse)] == [1, 2]
    desk.open(1, image("a"))
    assert desk.publish(1, meta_bytes=100) == [GiveHit(client=1, entry=2)]
    assert desk.book.used_bytes == UNIT + 100


def test_a_smaller_budget_evicts_what_may_go(desk: Desk) -> None:
    desk.put(1, image("a"))
    desk.put(2, image("b"))
    desk.open(3, image("b"))
    assert desk.book.set_budget(0, now_s=99.0) == [Free(entry=1)]
    assert desk.names() == ["b"]
    assert desk.leave(3) == [Free(entry=2)], "and the rest as soon as it may"
    assert desk.book.set_budget(10 * UNIT, now_s=99.0) == []


# ---- file images -----------------------------------------------------------------------------------------------------


def test_file_images_go_once_the_rank_images_are_there(desk: Desk) -> None:
    desk.open(1, image("f", kind="file", label="m"))
    desk.publish(1)
    desk.open(2, image("f", kind="file", label="m"))
    desk.open(3, image("r0", label="m"))
    desk.open(4, image("r1", label="m"))
    desk.leave(1)
    desk.publish(3)
    assert desk.leave(2) == [], "the other rank is still loading"
    assert desk.publish(4) == [GiveHit(client=4, entry=3), Free(entry=1)]


def test_file_images_of_another_model_or_in_use_stay(desk: Desk) -> None:
    desk.put(1, image("other", kind="file", label="n"))
    desk.open(2, image("used", kind="file", label="m"))
    desk.publish(2)
    desk.put(3, image("r", label="m"))
    assert desk.names() == ["other", "used", "r"]
    assert desk.leave(2) == [Free(entry=2)]


def test_a_rank_that_is_late_finds_what_the_first_has_read(desk: Desk) -> None:
    """The first is through, its image published, before the second has asked for anything."""
    file = image("f", kind="file", label="m", readers=2)
    desk.put(1, file)
    desk.put(2, image("r0", label="m"))
    desk.open(3, image("r1", label="m"))
    assert desk.open(4, file) == [GiveHit(client=4, entry=1)]
    assert desk.leave(4) == []
    assert desk.publish(3) == [GiveHit(client=3, entry=3), Free(entry=1)], "and now nobody is late"


def test_who_warmed_a_model_is_not_one_of_its_ranks(desk: Desk) -> None:
    file = image("f", kind="file", label="m", readers=2)
    desk.put(1, image("f", kind="file", label="m"))
    desk.use(2, file)
    desk.use(3, image("f", kind="file", label="m"))
    desk.put(4, image("r0", label="m"))
    assert desk.names() == ["f", "r0"]
    desk.use(5, file)
    assert desk.names() == ["r0"]


def test_a_rank_that_never_comes_is_not_waited_for(desk: Desk) -> None:
    desk.put(1, image("f", kind="file", label="m", readers=2))
    desk.put(2, image("r0", label="m"))
    used_s = next(entry.used_s for entry in desk.book.entries())
    assert desk.book.tick(used_s + LATE_S - 1) == []
    assert desk.book.tick(used_s + LATE_S) == [Free(entry=1)]


def test_a_reader_that_died_leaves_who_is_late_to_its_successor(desk: Desk) -> None:
    file = image("f", kind="file", label="m", readers=3)
    desk.open(1, file)
    desk.open(2, file)
    desk.leave(1)
    desk.publish(2)
    desk.leave(2)
    desk.put(3, image("r0", label="m"))
    assert desk.names() == ["f", "r0"], "the third"
    desk.use(4, file)
    assert desk.names() == ["r0"]


@pytest.mark.parametrize(("pin", "kept"), [("f", True), ("m", False)])
def test_only_a_pin_of_its_own_keeps_a_file_image(desk: Desk, pin: str, kept: bool) -> None:
    desk.put(1, image("f", kind="file", label="m"))
    desk.book.pin(pin)
    desk.put(2, image("r", label="m"))
    assert ("f" in desk.names()) is kept
    if kept:
        assert desk.book.unpin(pin, now_s=99.0) == (True, [Free(entry=1)])


def test_where_nobody_makes_a_rank_image_file_images_stay(desk: Desk) -> None:
    desk.put(1, image("f", kind="file", label="m"))
    desk.open(2, image("r", label="m"))
    desk.leave(2)
    assert desk.names() == ["f"]


# ---- pins and drops --------------------------------------------------------------------------------------------------


def test_a_pin_holds_for_what_is_to_come_and_keeps_the_holder(desk: Desk) -> None:
    assert desk.book.pin("m") == 0
    assert not desk.book.idle
    assert not desk.book.in_use
    desk.put(1, image("a", label="m"))
    assert [entry.pinned for entry in desk.book.entries()] == [True]
    assert desk.book.pin("m") == 1
    assert desk.book.unpin("m", now_s=99.0) == (True, [])
    assert desk.book.unpin("m", now_s=99.0) == (False, [])
    assert desk.book.idle


def test_pins_are_bounded(desk: Desk) -> None:
    for number in range(PINS_MAX):
        assert desk.book.pin(f"m{number}") == 0
    assert desk.book.pin("one more") is None
    assert desk.book.pin("m0") == 0


def test_what_is_dropped_goes_with_its_last_user(desk: Desk) -> None:
    desk.put(1, image("a", label="m"))
    desk.put(2, image("b", label="m"))
    desk.open(3, image("b", label="m"))
    desk.open(4, image("c", label="m"))
    assert desk.book.drop("m") == (2, 1, [Free(entry=1)]), "what is being filled is not touched"
    assert [entry.state for entry in desk.book.entries()] == [EntryState.DROPPED, EntryState.FILLING]
    assert desk.open(5, image("b", label="m")) == [GiveLease(client=5, entry=4)], "nobody finds it any more"
    assert desk.leave(3) == [Free(entry=2)]
    assert desk.book.drop("m") == (0, 0, [])


def test_a_page_of_entries_goes_on_after_a_number(desk: Desk) -> None:
    for number, key in enumerate("abc", start=1):
        desk.put(number, image(key))
    assert [entry.key for entry in desk.book.entries(after=1)] == ["b", "c"]


def test_the_numbers_add_up(desk: Desk) -> None:
    desk.put(1, image("f", kind="file", label="m"))
    desk.open(2, image("r", nbytes=ALIGNMENT_BYTES + 1))
    stats = desk.book.stats()
    assert stats.used_bytes == sum(stats.bytes.values()) == total_bytes(1) + total_bytes(ALIGNMENT_BYTES + 1)
    assert stats.entries == {ImageKind.FILE: 1, ImageKind.RANK: 1}
    assert stats.referenced_bytes == total_bytes(ALIGNMENT_BYTES + 1)
    assert stats.clients == 1
    before = stats.counts[ImageKind.FILE].hits
    desk.open(3, image("f", kind="file", label="m"))
    assert stats.counts[ImageKind.FILE].hits == before, "a copy, not the books themselves"


# ---- anything ----------------------------------------------------------------------------------------------------


# Few, so that clients meet: a model with two ranks and a file, and a larger one.
IMAGES = (
    image("m-0", label="m"),
    image("m-1", label="m"),
    image("m-file", kind="file", label="m"),
    image("m-ranks", kind="file", label="m", readers=2),
    image("big", nbytes=ALIGNMENT_BYTES + 1, label="n"),
)


class Anything(RuleBasedStateMachine):
    """Clients open, publish, leave and die, people pin, drop and set budgets, memory runs short: what always holds.

    Beside the books a model: which memory exists, who was told what, which memory was ever published.
    """

    clients = Bundle("clients")

    @initialize()
    def begin(self) -> None:
        self.desk = Desk(4 * UNIT)
        self.memory: dict[int, str] = {}  # entry -> key
        self.filled_by: dict[int, int] = {}  # entry -> client
        self.published: set[int] = set()
        self.told: dict[int, Action] = {}  # client -> the last word
        self.left: set[int] = set()
        self.next_client = 1

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Free):
                assert action.entry in self.memory, "freed twice, or never made"
                assert action.abandoned == (action.entry not in self.published)
                del self.memory[action.entry]
                self.filled_by.pop(action.entry, None)
                continue
            self.told[action.client] = action
            if isinstance(action, GiveLease):
                assert action.entry not in self.memory, "memory is never leased twice"
                self.memory[action.entry] = self.desk.book.image(action.entry).key
                self.filled_by[action.entry] = action.client
            elif isinstance(action, GiveHit):
                assert action.entry in self.published, "what was not published is not served"
                assert action.entry in self.memory
            elif isinstance(action, GiveFollow):
                assert action.entry in self.filled_by

    @rule(target=clients, wanted=st.sampled_from(IMAGES), free=st.sampled_from((None, None, None, 0, UNIT)))
    def open(self, wanted: Image, free: int | None) -> int:
        client, self.next_client = self.next_client, self.next_client + 1
        self.desk.free_bytes = free
        self.perform(self.desk.open(client, wanted))
        return client

    @rule(client=clients, meta_bytes=st.sampled_from((0, 0, 7, 3 * UNIT)))
    def publish(self, client: int, meta_bytes: int) -> None:
        leased = self.desk.book.lease_of(client)
        if leased is not None:
            entry = leased[0]
            assert self.filled_by[entry] == client
            actions = self.desk.publish(client, meta_bytes=meta_bytes)
            if not any(isinstance(action, Refuse) for action in actions):
                self.published.add(entry)
                del self.filled_by[entry]
            self.perform(actions)

    @rule(target=clients, client=consumes(clients), free=st.sampled_from((None, None, None, -UNIT)))
    def leave(self, client: int, free: int | None):  # type: ignore[no-untyped-def]
        self.desk.free_bytes = free
        self.left.add(client)
        self.perform(self.desk.leave(client))
        return multiple()

    @rule(passed_s=st.sampled_from((1.0, LATE_S)))
    def tick(self, passed_s: float) -> None:
        self.desk.now_s += passed_s
        self.perform(self.desk.book.tick(self.desk.now_s))

    @rule(client=clients)
    def no_memory(self, client: int) -> None:
        if self.desk.book.lease_of(client) is not None:
            self.perform(self.desk.book.no_memory(client, "none"))

    @rule(name=st.sampled_from(("m", "n", "m-0", "m-file")))
    def pin(self, name: str) -> None:
        self.desk.book.pin(name)

    @rule(name=st.sampled_from(("m", "n", "m-0", "m-file")))
    def unpin(self, name: str) -> None:
        self.perform(self.desk.book.unpin(name, now_s=99.0)[1])

    @rule(name=st.sampled_from(("m", "n", "m-1")))
    def drop(self, name: str) -> None:
        self.perform(self.desk.book.drop(name)[2])

    @rule(units=st.integers(0, 6))
    def budget(self, units: int) -> None:
        self.perform(self.desk.book.set_budget(units * UNIT, now_s=99.0))

    @invariant()
    def holds(self) -> None:
        book = self.desk.book
        book.check()
        entries = {entry.number: entry for entry in book.entries()}
        assert set(entries) == set(self.memory), "memory without an entry would leak"
        assert {n for n, e in entries.items() if e.state is EntryState.FILLING} == set(self.filled_by)
        # Above a budget that was lowered there is only what may not go.
        movable = sum(e.charged_bytes for e in entries.values() if not e.references and not e.pinned)
        stats = book.stats()
        assert stats.used_bytes <= book.budget_bytes or not movable
        for client, word in self.told.items():
            given = not isinstance(word, Refuse) and client not in self.left
            assert book.holds(client) is given, "who has nothing was told so"


Anything.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestAnything = Anything.TestCase
