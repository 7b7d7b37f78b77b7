"""Every way in which weights come to a loader, behind one door: put a model where that way has it, and load it tensor by tensor."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ghostserve.engine.loader_files import FileBytes, tensors
from ghostserve.errors import WeightsError
from ghostserve.weights.checksum_file import ChecksumFile
from ghostserve.weights.checksums import Checksums
from ghostserve.weights.model_files import INDEX, ModelFiles, WeightsFile, open_model
from ghostserve.weights.own_file import OwnFile
from ghostserve.weights.pool import Follow, Hit, Lease, Pool, Refused
from ghostserve.weights.pooled_file import PooledFile, file_key
from ghostserve.weights.pull import Pulled, pull
from ghostserve.weights.recycled import Recycler
from model_server import ModelServer, serving
from s3_kit import bucket
from weights_kit import write_weights
from weights_pool_kit import Place

Files = dict[str, bytes]
Spans = list[tuple[int, int]]
LABEL = "model"
BUDGET_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way. `home`: disk, memory, http or s3. `pool`: what the pool gives; None where it is not asked."""

    name: str
    home: str = "disk"
    direct: bool | None = None
    pool: type[Lease | Follow | Hit | Refused] | None = None

    @property
    def reads_files(self) -> bool:
        """Whether a load needs the file's bytes at all."""
        return self.pool is not Hit


WAYS = (
    Way(name="disk, direct where it is faster"),
    Way(name="disk, direct", direct=True),
    Way(name="disk, page cache", direct=False),
    Way(name="tmpfs", home="memory"),
    Way(name="pool, leader", pool=Lease),
    Way(name="pool, follower", pool=Follow),
    Way(name="pool, hit", pool=Hit),
    Way(name="pool, refused", pool=Refused),
    Way(name="HTTP, disk cache", home="http"),
    Way(name="S3, disk cache", home="s3"),
)


class Remotes:
    """Models that were pulled into a disk cache, each once: a test gets a copy of that."""

    def __init__(self, root: Path, server: Callable[[], str]) -> None:
        """`server`: the address of one that speaks S3; only called where it is needed."""
        self._root, self._server = root, server
        self._pulled: dict[tuple[str, bytes], tuple[Path, Path]] = {}

    def cached(self, kind: str, files: Files, into: Path) -> Path:
        """The model's folder in the cache `into`."""
        key = (kind, files[LARGE])
        if key not in self._pulled:
            root = self._root / f"{kind}-{len(self._pulled)}"
            self._pulled[key] = (root, self._pull(kind, files, root).path)
        root, path = self._pulled[key]
        shutil.copytree(root, into, symlinks=True, dirs_exist_ok=True)
        return into / path.relative_to(root)

    def _pull(self, kind: str, files: Files, root: Path) -> Pulled:
        if kind == "http":
            with serving(ModelServer(dict(files))) as world:
                return pull(world.url, root=root, environment={})
        with bucket(self._server()) as store:
            store.put(files)
            return store.pull(root)


class Tier:
    """One way in one test. `place`: where the pool is held. `remotes`: where models come from that are not here yet."""

    def __init__(self, way: Way, scratch: Path, place: Place, remotes: Remotes) -> None:
        self.way = way
        self._scratch, self._remotes = scratch, remotes
        self._leading: list[threading.Thread] = []
        self._pool: Pool | None = None
        if way.pool is not None:
            self._pool = place.pool(budget_bytes=1 if way.pool is Refused else BUDGET_BYTES)
        self._memory = Path(tempfile.mkdtemp(prefix="ghostserve-", dir="/dev/shm"))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.drop(LABEL)
        shutil.rmtree(self._memory)
        shutil.rmtree(self._scratch / "cache", ignore_errors=True)

    def put(self, files: Files) -> Path:
        """The folder in which a load by this way finds them."""
        if self.way.home in ("http", "s3"):
            return self._remotes.cached(self.way.home, files, self._scratch / "cache")
        folder = self._memory if self.way.home == "memory" else self._scratch / "model"
        folder.mkdir(exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return folder

    def model(self, folder: Path) -> ModelFiles:
        """Its headers read; where the pool is to have it, it has."""
        model = open_model(folder)
        if self.way.pool is Hit:
            sums = self._sums(model)
            for file in model.files:
                first = self._pooled(file, [], sums.of(file))
                first.wait()
                first.close()
            self._save(sums)
        return model

    def load(
        self, model: ModelFiles, wanted: Callable[[str], bool] = lambda name: True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """As vLLM's loader does: tensor by tensor, and what was learned of the bytes is kept once all of them are there."""
        ours, theirs, recycler = self._sums(model), self._sums(model), Recycler()
        try:
            yield from tensors(
                model.files,
                lambda file, spans: self.open(file, spans, ours.of(file), theirs.of(file), recycler),
                wanted,
            )
        finally:
            for thread in self._leading:
                thread.join(20)
            self._leading.clear()
        for sums in (ours, theirs):
            self._save(sums)

    def open(
        self, file: WeightsFile, spans: Spans, ours: Checksums, theirs: Checksums, recycler: Recycler
    ) -> FileBytes:
        """`theirs`: of another process that reads the same, where one does."""
        wanted = self.way.pool
        if wanted is None:
            return OwnFile(file, spans, recycler, direct=self.way.direct, verify=ours)
        assert self._pool is not None
        if wanted in (Lease, Follow):
            self._pool.drop(file_key(file))
        leader = self._pooled(file, [], theirs) if wanted is Follow else None
        mine = self._pooled(file, spans, ours)
        held = type(mine._held) if mine.in_pool else Refused
        if leader is not None:
            assert isinstance(leader._held, Lease)
            self._leading.append(threading.Thread(target=_lead, args=(leader,)))
            self._leading[-1].start()
        assert held is wanted
        return mine

    def _pooled(self, file: WeightsFile, spans: Spans, sums: Checksums) -> PooledFile:
        assert self._pool is not None
        return PooledFile(self._pool, file, spans, label=LABEL, verify=sums)

    def _sums(self, model: ModelFiles) -> ChecksumFile:
        return ChecksumFile(model, folder=self._memory / "sums")  # what a test writes to a disk it waits for

    def _save(self, sums: ChecksumFile) -> None:
        if sums.learned:
            assert sums.save()


def _lead(leader: PooledFile) -> None:
    """What another process does with its own."""
    with contextlib.suppress(WeightsError):
        leader.wait()
    leader.close()


# ---- the model -------------------------------------------------------------------------------------------------------

LARGE = "model-00001-of-00004.safetensors"
"""The only one with more than a few bytes."""
ODD = "model-00002-of-00004.safetensors"
SHARDS: dict[str, dict[str, tuple[str, list[int]]]] = {
    LARGE: {
        "skew": ("U8", [3]),  # what comes after it is aligned to nothing
        "longer than a block": ("BF16", [301, 257]),
        "odd": ("F32", [101, 99]),
        "bytes": ("U8", [150_001]),
        "float8": ("F8_E4M3", [33, 1001]),
        "doubles": ("F64", [1, 5001]),
        "the end": ("I8", [13]),
    },
    ODD: {
        "bool": ("BOOL", [13]),
        "scalar": ("F64", []),
        "empty": ("F32", [0]),
        "no rows": ("BF16", [0, 7]),
        "one": ("I64", [1]),
        "float8 too": ("F8_E5M2", [5, 3]),
        "half": ("F16", [3, 1, 1]),
        **{f"tiny {number}": ("I32", [number]) for number in range(20)},
        **{f"whole {kind}": (kind, [7]) for kind in ("I16", "U16", "U32", "U64", "C64")},
    },
    "model-00003-of-00004.safetensors": {"nothing": ("F16", [0])},
    "model-00004-of-00004.safetensors": {"last": ("U8", [1])},
}


def make_files(folder: Path, *, seed: int) -> Files:
    """A model of four shards, as files by their names."""
    files = {
        name: write_weights(folder / name, shard, seed=seed + number)
        for number, (name, shard) in enumerate(SHARDS.items())
    }
    names = ", ".join(f'"{tensor}": "{name}"' for name, shard in SHARDS.items() for tensor in shard)
    return {**files, INDEX: f'{{"weight_map": {{{names}}}}}'.encode(), "config.json": b"{}"}
