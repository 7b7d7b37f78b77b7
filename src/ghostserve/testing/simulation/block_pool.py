"""The simulated scheduler's blocks: who uses them, which of them the prefix cache knows, and which are free."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator

Key = tuple[int, int, int]  # group, index, hash of all tokens up to the end of the block


class BlockPool:
    """Blocks 1..n; 0 is vLLM's placeholder. Free ones in the order of their next use."""

    def __init__(self, blocks: int) -> None:
        self.users = [0] * (blocks + 1)
        self.keys: list[Key | None] = [None] * (blocks + 1)
        self.free: OrderedDict[int, None] = OrderedDict((block, None) for block in range(1, blocks + 1))
        self._cached: dict[Key, list[int]] = {}

    def is_live(self, block: int) -> bool:
        return self.users[block] > 0 or self.keys[block] is not None

    def is_cached(self, block: int) -> bool:
        return self.keys[block] is not None

    def cached_only(self) -> Iterator[int]:
        yield from self.free

    def take(self) -> int:
        block, _ = self.free.popitem(last=False)
        self.forget(block)
        self.users[block] = 1
        return block

    def share(self, block: int) -> None:
        if self.users[block] == 0:
            del self.free[block]
        self.users[block] += 1

    def give_back(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self.users[block] -= 1
            assert self.users[block] >= 0, f"block {block} is given back twice"
            if self.users[block] == 0:
                self.free[block] = None

    def find(self, key: Key) -> int | None:
        known = self._cached.get(key)
        return known[0] if known else None

    def remember(self, block: int, key: Key) -> None:
        if self.keys[block] is None:
            self.keys[block] = key
            self._cached.setdefault(key, []).append(block)

    def forget(self, block: int) -> None:
        key, self.keys[block] = self.keys[block], None
        if key is not None:
            self._cached[key].remove(block)
            if not self._cached[key]:
                del self._cached[key]

    def cached(self) -> Iterator[tuple[int, Key]]:
        for blocks in self._cached.values():
            for block in blocks:
                key = self.keys[block]
                assert key is not None
                yield block, key
