"""The random-number states a rank holds, captured and put back as one record.

A rank that is rebuilt must draw what the lost one would have drawn. torch's default generator serves unseeded
requests (equal on all ranks only because they draw in lockstep), numpy's global state is what some request
seeds are drawn from, and each seeded request has a generator of its own.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from dataclasses import dataclass, field

import msgspec
import numpy as np
import torch


@dataclass(slots=True, kw_only=True)
class RandomState:
    """Random states and row order after a step: what the next step starts from.

    `default` is torch's default generator (and the device's, where it has one), `numpy` the key and position
    of numpy's global Mersenne Twister, `generators` one state per seeded request, `order` the request ids by
    row of the persistent batch. Model Runner V2 samples without states: `seeds` are its requests'.
    """

    order: list[bytes]
    default: bytes
    device: bytes = b""
    numpy_key: bytes = b""
    numpy_position: int = 0
    numpy_gauss: tuple[int, float] = (0, 0.0)
    generators: dict[bytes, bytes] = field(default_factory=dict)
    seeds: dict[bytes, int] = field(default_factory=dict)

    @classmethod
    def capture(
        cls,
        *,
        order: list[str],
        device: torch.device,
        generators: dict[str, torch.Generator] | None = None,
        seeds: dict[str, int] | None = None,
    ) -> RandomState:
        """The states of this process, now."""
        key, position, gauss = _numpy_state()
        return cls(
            order=[short_id(name) for name in order],
            default=torch.get_rng_state().numpy().tobytes(),
            device=torch.cuda.get_rng_state(device).numpy().tobytes() if device.type == "cuda" else b"",
            numpy_key=key,
            numpy_position=position,
            numpy_gauss=gauss,
            generators={
                short_id(name): generator_bytes(generator) for name, generator in (generators or {}).items()
            },
            seeds={short_id(name): seed for name, seed in (seeds or {}).items()},
        )

    def restore_globals(self, device: torch.device) -> None:
        """Put the process-wide states back. Generators are built per request by the caller."""
        torch.set_rng_state(_tensor(self.default))
        if self.device and device.type == "cuda":
            torch.cuda.set_rng_state(_tensor(self.device), device)
        if not self.numpy_key:
            return
        key = np.frombuffer(self.numpy_key, dtype=np.uint32)
        np.random.set_state(("MT19937", key, self.numpy_position, *self.numpy_gauss))
        _numpy_known.clear()

    def generator(self, request_id: str, device: torch.device) -> torch.Generator | None:
        """A new generator in the recorded state, or None if the request had none."""
        state = self.generators.get(short_id(request_id))
        if state is None:
            return None
        generator = torch.Generator(device=device)
        generator.set_state(_tensor(state))
        return generator

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, record: bytes) -> RandomState:
        return msgspec.msgpack.decode(record, type=cls)


_NUMPY_STATE_BYTES = 624 * 4 + 4  # numpy's mt19937_state: key and position
_numpy_known: dict[bytes, tuple[bytes, int, tuple[int, float]]] = {}  # at most one: the state read last


def _numpy_state() -> tuple[bytes, int, tuple[int, float]]:
    """Key, position and kept normal variate of numpy's global state.

    `np.random.get_state` takes 50 us, so it is asked only where something was drawn since: the generator's words differ
    then. Only a normal variate that was kept can be drawn without it; while there is one, it is asked each time.
    """
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]  # public; missing in the stubs
    if not isinstance(generator, np.random.MT19937):
        return b"", 0, (0, 0.0)  # somebody set another kind, which is not kept
    words = ctypes.string_at(generator.ctypes.state_address, _NUMPY_STATE_BYTES)
    known = _numpy_known.get(words)
    if known is None:
        _, key, position, has_gauss, cached = np.random.get_state(legacy=True)
        known = np.asarray(key, dtype=np.uint32).tobytes(), int(position), (int(has_gauss), float(cached))
        _numpy_known.clear()
        if not has_gauss:
            _numpy_known[words] = known
    return known


@functools.lru_cache(maxsize=4096)
def short_id(request_id: str) -> bytes:
    """16 bytes that stand for a request id."""
    return hashlib.blake2b(request_id.encode(), digest_size=16).digest()


def generator_bytes(generator: torch.Generator) -> bytes:
    """A generator's whole state."""
    return generator.get_state().numpy().tobytes()


def _tensor(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
