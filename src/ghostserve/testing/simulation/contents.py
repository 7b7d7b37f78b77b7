"""What the model would compute: the KV of every token and the token that follows, as a function of the tokens alone.

A position's KV is a hash of its token and of *all* KV before it, on all ranks and in all groups; the next token is a
hash of all KV. So one wrong byte anywhere changes every later byte and token, as in a real model, and nothing a
schedule does may change either.

    kv[p] = blake2b(token[p], state[p-1])      n · g parts of SLOT_BYTES, one per rank and group
    state[p] = crc32(crc32 of part (g, r) of positions 0..p, for all g and r)
    token[p+1] = hash(state[p], seed of the request)
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from hashlib import blake2b

SLOT_BYTES = 4
VOCABULARY = 509
STOP_SHARE = 23  # one token of so many ends its request
_POSITION = struct.Struct("<II")


def parts(token: int, chain: list[int]) -> bytes:
    """KV of the next position after `chain`: SLOT_BYTES for each part of it."""
    state = zlib.crc32(struct.pack(f"<{len(chain)}I", *chain))
    return blake2b(_POSITION.pack(token, state), digest_size=SLOT_BYTES * len(chain)).digest()


def next_token(chain: list[int], seed: int) -> int:
    """What is sampled after everything in `chain`."""
    state = zlib.crc32(struct.pack(f"<{len(chain)}I", *chain))
    return zlib.crc32(_POSITION.pack(state, seed)) % VOCABULARY


def ends(token: int) -> bool:
    """Whether the token ends its request."""
    return token % STOP_SHARE == 0


@dataclass(slots=True)
class Truth:
    """One request without any failure: its tokens, and the bytes of every part, as far as asked for."""

    tokens: list[int]
    seed: int
    parts: int  # ranks times groups
    prompt: int = 0  # tokens it begins with
    _chain: list[int] = field(default_factory=list)
    _streams: list[bytearray] = field(default_factory=list)
    _positions: int = 0

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)
        self._chain = [0] * self.parts
        self._streams = [bytearray() for _ in range(self.parts)]

    def token(self, index: int) -> int:
        """The token at this place, prompt and outputs counted together."""
        while len(self.tokens) <= index:
            self._advance(len(self.tokens))
            self.tokens.append(next_token(self._chain, self.seed))
        return self.tokens[index]

    def kv(self, part: int, first: int, last: int) -> bytes:
        """The bytes of positions [first, last) of one part (group * ranks + rank)."""
        self.token(last - 1)
        self._advance(last)
        return bytes(self._streams[part][first * SLOT_BYTES : last * SLOT_BYTES])

    def _advance(self, positions: int) -> None:
        chain, streams = self._chain, self._streams
        while self._positions < positions:
            data = parts(self.tokens[self._positions], chain)
            for part in range(self.parts):
                piece = data[part * SLOT_BYTES : (part + 1) * SLOT_BYTES]
                chain[part] = zlib.crc32(piece, chain[part])
                streams[part] += piece
            self._positions += 1
