"""The other trial of `ghostserve bench load`: every byte of every tensor looked at, with no model around it.

What a model does with the bytes (on a CPU it copies and packs them) hides what a reader costs; here nothing does. As in vLLM's own loop a
tensor is dropped for the next one. The look is a crc32 at memory speed, so the trials show that they read the same.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ghostserve.engine.load_meter import Meter
from ghostserve.engine.loader_files import FileBytes, tensors
from ghostserve.native.checksum import crc32
from ghostserve.weights.checksum_file import ChecksumFile
from ghostserve.weights.checksums import Checksums
from ghostserve.weights.model_files import WeightsFile, open_files
from ghostserve.weights.own_file import OwnFile
from ghostserve.weights.pool import Pool
from ghostserve.weights.pooled_file import PooledFile
from ghostserve.weights.recycled import Recycler

Tensors = Generator[tuple[str, torch.Tensor], None, None]


def mapped_tensors(files: list[str]) -> Tensors:
    """As vLLM's `lazy`: the file is mapped, and a tensor read by whoever touches it."""
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)


def eager_tensors(files: list[str]) -> Tensors:
    """As vLLM's `eager`: the whole file by one read."""
    from safetensors.torch import load

    for file in files:
        yield from load(Path(file).read_bytes()).items()


def prefetched_tensors(files: list[str]) -> Tensors:
    """As vLLM's `prefetch`: eight threads read the files into the page cache while they are mapped."""
    from vllm.model_executor.model_loader.weight_utils import _prefetch_all_checkpoints

    _prefetch_all_checkpoints(files)
    yield from mapped_tensors(files)


def fastsafetensors_tensors(files: Iterable[str]) -> Tensors:
    """fastsafetensors' pipeline, as vLLM calls it but for the device."""
    from fastsafetensors.parallel_loader import ParallelLoader, SingleGroup

    distributed = torch.distributed.is_initialized()
    loader = ParallelLoader(
        pg=torch.distributed.group.WORLD if distributed else SingleGroup(),
        hf_weights_files=list(files),
        use_tqdm_on_load=False,
        device="cpu",
        nogds=True,
    )
    try:
        yield from loader.iterate_weights()
    finally:
        loader.close()


def runai_tensors(files: list[str]) -> Tensors:
    """Run:ai's streamer. A tensor is valid until the next one, so it is copied, as vLLM does."""
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files(files, device="cpu", is_distributed=False)
        for name, tensor in streamer.get_tensors():
            yield name, tensor.clone()


def our_tensors(files: list[str]) -> Tensors:
    """What the load format `ghostserve` does without a pool, checksums included."""
    recycler = Recycler()

    def open_alone(file: WeightsFile, spans: list[tuple[int, int]], verify: Checksums) -> FileBytes:
        return OwnFile(file, spans, recycler, direct=None, verify=verify)

    return _ours(files, open_alone)


def our_pooled_tensors(files: list[str]) -> Tensors:
    """What it does with several ranks: whole files, by way of the pool."""
    pool = Pool.connect(start=True)
    assert pool is not None, "there is no pool"

    def open_pooled(file: WeightsFile, spans: list[tuple[int, int]], verify: Checksums) -> FileBytes:
        return PooledFile(pool, file, spans, label="bench", verify=verify)

    return _ours(files, open_pooled)


def _ours(
    files: list[str], open_bytes: Callable[[WeightsFile, list[tuple[int, int]], Checksums], FileBytes]
) -> Tensors:
    paths = [Path(file) for file in files]
    model = open_files(paths, folder=paths[0].parent)
    checksums = ChecksumFile(model)
    yield from tensors(
        model.files, lambda file, spans: open_bytes(file, spans, checksums.of(file)), lambda name: True
    )
    if checksums.learned:
        checksums.save()


READERS: dict[str, Callable[[list[str]], Tensors]] = {
    "vllm": mapped_tensors,
    "vllm-eager": eager_tensors,
    "vllm-prefetch": prefetched_tensors,
    "fastsafetensors": fastsafetensors_tensors,
    "runai": runai_tensors,
    "ghostserve": our_tensors,
    "ghostserve-pool": our_pooled_tensors,
}


def raw_trial(
    task: dict[str, Any], when_ready: Callable[[], None]
) -> tuple[torch.Tensor | None, dict[str, Any]]:
    """Wait, read and look at everything: the last tensor, which is still there, and the figures."""
    files = sorted(str(path) for path in Path(task["model"]).glob("*.safetensors"))
    when_ready()
    meter = Meter()
    digest, tensor = 0, None
    for name, tensor in READERS[task["reader"]](files):
        digest ^= look(name, tensor)
    return tensor, {**meter.stop(), "post_s": 0.0, "digest": f"{digest:08x}"}


def look(name: str, tensor: torch.Tensor) -> int:
    """A word that every byte of a tensor, and its name, has a part in. In any order, by exclusive or, they make one for all."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return crc32(data, crc32(np.frombuffer(name.encode(), np.uint8)))
