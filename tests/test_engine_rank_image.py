"""A rank's parameters into the pool and out of it, with a holder of one's own and models of torch alone."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ghostserve.clock import monotonic_s
from ghostserve.engine import rank_image
from ghostserve.engine.model_memory import layout_of, why_not
from ghostserve.weights import rank_file
from ghostserve.weights.mapping import Mapped
from ghostserve.weights.pool import Hit, Pool
from ghostserve.weights.pool_types import EntryState
from ghostserve.weights.rank_file import open_rank_file
from weights_kit import flip_byte
from weights_pool_kit import Place, eventually

pytestmark = pytest.mark.long

ROWS = 300  # times 256 floats: large, with pages of its own


class Model(nn.Module):
    """Two large parameters, a small one, and one that both modules have."""

    def __init__(self, *, device: str = "cpu") -> None:
        super().__init__()
        self.large = nn.Parameter(torch.empty(ROWS, 256, device=device), requires_grad=False)
        self.bytes = nn.Parameter(torch.empty(1 << 17, dtype=torch.uint8), requires_grad=False)
        self.small = nn.Parameter(torch.full((3,), 0.5, dtype=torch.bfloat16), requires_grad=False)
        self.tied = nn.Module()
        self.tied.weight = self.large
        self.register_buffer("table", torch.arange(4.0))


def fill(model: Model) -> None:
    generator = torch.Generator().manual_seed(3)
    model.large.data.copy_(torch.randn(ROWS, 256, generator=generator))
    model.bytes.data.copy_(torch.randint(0, 256, (1 << 17,), generator=generator, dtype=torch.uint8))


def contents(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in model.named_parameters()}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path / "run")
    yield place
    rank_image._KEPT.clear()
    place.close()


def load(
    place: Place | None,
    model: nn.Module,
    way: Callable[[], object],
    *,
    key: str = "rank-0",
    unchanged: bool = True,
    in_recovery: bool = False,
) -> None:
    wanted = rank_image.Wanted(key=key, label="model", in_recovery=in_recovery, unchanged=lambda: unchanged)
    rank_image.load(model, None if place is None else place.pool(), wanted, way)  # type: ignore[arg-type]


def loaded(place: Place | None) -> tuple[Model, int]:
    """A model that is loaded, and how often that took vLLM's way."""
    model, filled = Model(), []
    load(place, model, lambda: filled.append(fill(model)))
    return model, len(filled)


@pytest.fixture
def expected() -> dict[str, torch.Tensor]:
    model = Model()
    fill(model)
    return contents(model)


def same(model: nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one, expected[name]) for name, one in model.named_parameters())


def test_first_filled_then_mapped(place: Place, expected: dict[str, torch.Tensor]) -> None:
    """What loading does not touch keeps the value that it was built with."""
    first, filled = loaded(place)
    second, filled_again = loaded(place)
    assert (filled, filled_again) == (1, 0)
    assert same(first, expected)
    assert same(second, expected)
    assert second.tied.weight is second.large


def test_who_changes_his_parameters_changes_nobody_elses(
    place: Place, expected: dict[str, torch.Tensor]
) -> None:
    for model in (loaded(place)[0], loaded(place)[0]):
        for one in model.parameters():
            one.data.zero_()
    assert same(loaded(place)[0], expected)


def test_the_memory_of_a_parameter_goes_with_it(place: Place) -> None:
    """As when vLLM has made its own copy of a linear layer's weight."""
    loaded(place)
    model = loaded(place)[0]
    large = model.large.data_ptr()
    assert mapped(large)
    model.tied.weight = model.large = nn.Parameter(torch.empty(0), requires_grad=False)
    assert not mapped(large)
    assert mapped(model.bytes.data_ptr())


def mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, _, last = line.split()[0].partition("-")
        if int(first, 16) <= address < int(last, 16):
            return "ghostserve-weights" in line
    return False


def test_an_error_while_loading_is_the_loaders(place: Place, expected: dict[str, torch.Tensor]) -> None:
    """Nothing is published, and the next one loads."""

    def fail() -> None:
        raise OSError("the disk")

    with pytest.raises(OSError, match="the disk"):
        load(place, Model(), fail)
    model, filled = loaded(place)
    assert filled == 1
    assert same(model, expected)


def buffer(model: Model) -> None:
    model.table += 1


def attribute(model: Model) -> None:
    model.seen = {"large"}


def replaced(model: Model) -> None:
    model.bytes = nn.Parameter(model.bytes.data.clone(), requires_grad=False)


def another_memory(model: Model) -> None:
    model.bytes.data = model.bytes.data.clone()


def attribute_of_a_parameter(model: Model) -> None:
    model.small.shard = 1


@pytest.mark.parametrize("more", [buffer, attribute, replaced, another_memory, attribute_of_a_parameter])
def test_loading_that_does_more_than_fill(
    place: Place, expected: dict[str, torch.Tensor], more: Callable[[Model], None], caplog
) -> None:
    """The model is loaded and nothing is published: a second process would lack what was done beside."""
    caplog.set_level(logging.INFO)
    model = Model()

    def way() -> None:
        fill(model)
        more(model)

    load(place, model, way)
    assert same(model, expected)
    assert "loading this model does more than fill parameters" in caplog.text
    assert not place.pool().list()


def test_files_that_changed_meanwhile(place: Place, expected: dict[str, torch.Tensor]) -> None:
    model = Model()
    load(place, model, lambda: fill(model), unchanged=False)
    assert same(model, expected)
    assert not place.pool().list()


# -- copies on the disk ------------------------------------------------------------------------------------------------

KEY = "rank-" + "7b" * 32


@pytest.fixture
def copy(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a model that was loaded once; the pool has forgotten it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = Model()
    load(place, model, lambda: fill(model), key=KEY)
    with place.pool().open(KEY, layout_of(model).nbytes, kind="rank", label="m", reload_cost_s=1.0) as hit:
        assert isinstance(hit, Hit)
        image = Mapped(hit.fd, offset=0, length=hit.nbytes, shared=False).array()
        path = rank_file.write(image, hit.meta, key=KEY, label="model")
    for kept in rank_image._KEPT:
        kept.close()
    rank_image._KEPT.clear()
    del image
    place.pool().drop("model")
    eventually(lambda: place.pool().list() == [])
    return path


def loaded_with_copy(place: Place) -> tuple[Model, int]:
    model, filled = Model(), []
    load(place, model, lambda: filled.append(fill(model)), key=KEY)
    return model, len(filled)


def test_out_of_a_copy_on_the_disk(place: Place, expected: dict[str, torch.Tensor], copy: Path) -> None:
    """Then it is in the pool as if it had been loaded, and the copy is not asked again."""
    first, filled = loaded_with_copy(place)
    assert filled == 0
    assert same(first, expected)
    copy.unlink()
    second, filled = loaded_with_copy(place)
    assert filled == 0
    assert same(second, expected)


@pytest.mark.parametrize("harm", ["a byte", "the end", "the header", "the table"])
def test_a_copy_that_is_not_in_order_is_not_used(
    place: Place, expected: dict[str, torch.Tensor], copy: Path, caplog, harm: str
) -> None:
    """The model's own files are read, a line names the copy, and nobody gets what was read of it."""
    if harm == "a byte":
        flip_byte(copy, copy.stat().st_size - 1)
    elif harm == "the end":
        os.truncate(copy, copy.stat().st_size - 1)
    elif harm == "the header":
        flip_byte(copy, 9)
    else:
        copy.write_bytes(copy.read_bytes().replace(b"large", b"lurge", 1))
    for _ in range(2):
        model, filled = loaded_with_copy(place)
        assert same(model, expected)
    assert "the copy of this rank is not used" in caplog.text
    assert filled == (
        1 if harm == "a byte" else 0
    )  # whose memory was touched is given up; others publish as ever


def rewritten(copy: Path, *, table: object = None, image: Callable[[bytes], bytes] = bytes) -> None:
    """Another table or image, with all that belongs to it in order: by somebody who knows the format."""
    data, before = copy.read_bytes(), json.loads(open_rank_file(copy).table)
    begin = 8 + int.from_bytes(data[:8], "little")
    text = table if isinstance(table, str) else json.dumps(before | (table or {}))  # type: ignore[operator]
    header = rank_file._header(
        np.frombuffer(image(data[begin:]), np.uint8), b"@TABLE@", key=KEY, label="model"
    )
    length = len(header) - 8
    header = header[8:].rstrip().replace(b'"@TABLE@"', json.dumps(text).encode())
    copy.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + image(data[begin:]))


@pytest.mark.parametrize(
    "table",
    [
        "\ud800",
        "[" * 100_000,
        '{"version":' * 3000 + "1" + "}" * 3000,
        "[]",
        {"version": 2},
        {"nbytes": []},
        {"parameters": 5},
        {"parameters": None},
        {"parameters": {}},
        {"parameters": [1, 2]},
        {"parameters": []},
    ],
    ids=lambda table: str(table)[:30],
)
def test_a_table_that_makes_no_sense(
    place: Place, expected: dict[str, torch.Tensor], copy: Path, caplog, table: object
) -> None:
    """Whatever it holds: a warning of bearable length, and the model's own files."""
    rewritten(copy, table=table)
    model, filled = loaded_with_copy(place)
    assert filled == 1
    assert same(model, expected)
    (said,) = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
    assert "the copy of this rank is not used" in said
    assert copy.name in said
    assert len(said) < 1500


@pytest.mark.parametrize("change", [lambda image: image[:-4096], lambda image: image + bytes(4096)])
def test_an_image_of_another_length_is_not_used(
    place: Place,
    expected: dict[str, torch.Tensor],
    copy: Path,
    caplog,
    change: Callable[[bytes], bytes],
) -> None:
    """Though its table is the model's, and its checksums are its own: what it lacks would be zeros."""
    rewritten(copy, image=change)
    for filled_then in (1, 0):
        model, filled = loaded_with_copy(place)
        assert filled == filled_then
        assert same(model, expected)
    assert copy.name in caplog.text


def removed(copy: Path) -> None:
    copy.unlink()


def replaced_by_another(copy: Path) -> None:
    rank_file.write(np.zeros(copy.stat().st_size - 4096, np.uint8), b"{}", key=KEY, label="model")


def grown(copy: Path) -> None:
    with copy.open("ab") as file:
        file.write(b"x")


def shortened(copy: Path) -> None:
    os.truncate(copy, copy.stat().st_size - 1)


@pytest.mark.parametrize("change", [removed, replaced_by_another, grown, shortened])
@pytest.mark.parametrize("when", ["before it is read", "after it was read"])
def test_a_copy_that_changes_while_it_is_read(
    place: Place,
    expected: dict[str, torch.Tensor],
    copy: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    when: str,
) -> None:
    """Its header was in order. What may be half of it, nobody gets; what was read as a whole before is as good as ever."""
    read = rank_file.RankFile.read

    def changing(kept: rank_file.RankFile, into: memoryview) -> None:
        if when == "before it is read":
            change(copy)
        read(kept, into)
        change(copy)

    monkeypatch.setattr(rank_file.RankFile, "read", changing)
    model, filled = loaded_with_copy(place)
    assert same(model, expected)
    assert filled == (1 if when == "before it is read" else 0)
    if filled:
        assert place.pool().list() == []


def test_memory_that_cannot_be_made_private_is_given_up(
    place: Place, expected: dict[str, torch.Tensor], copy: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    def fail(self: Mapped, fd: int) -> None:
        raise OSError("no memory")

    with monkeypatch.context() as failing:
        failing.setattr(Mapped, "make_private", fail)
        model, filled = loaded_with_copy(place)
    assert filled == 1
    assert same(model, expected)
    assert "make it again with 'ghostserve models optimise'" in caplog.text
    assert place.pool().list() == []
    assert loaded_with_copy(place)[1] == 0


def test_a_copy_of_somebody_else_is_not_used(
    place: Place, expected: dict[str, torch.Tensor], copy: Path, caplog
) -> None:
    """All is in order with it, but who put it there."""
    copy.parent.chmod(0o777)
    model, filled = loaded_with_copy(place)
    assert filled == 1
    assert same(model, expected)
    assert f"{copy.parent}: every user can write to it" in caplog.text


def test_a_disk_that_hangs_does_not_hold_up_a_replacement(
    place: Place, expected: dict[str, torch.Tensor], copy: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    """Clients wait for it, and the model's own files may lie on another disk."""
    answered, model = threading.Event(), Model()
    monkeypatch.setattr(rank_file, "open_file", lambda *_: answered.wait(30))
    began_s = monotonic_s()
    load(place, model, lambda: fill(model), key=KEY, in_recovery=True)
    assert monotonic_s() - began_s < 3
    answered.set()
    assert same(model, expected)
    assert "did not answer for 0.5 s" in caplog.text


def test_rank_0_under_the_name_of_rank_1(
    place: Place, expected: dict[str, torch.Tensor], copy: Path, caplog
) -> None:
    key = "rank-" + "7c" * 32
    copy.rename(rank_file.path_of(key))
    model, filled = Model(), []
    load(place, model, lambda: filled.append(fill(model)), key=key)
    assert len(filled) == 1
    assert same(model, expected)
    assert "is the image of another key" in caplog.text


def test_a_copy_that_is_written_anew_as_it_was_is_used(
    place: Place, expected: dict[str, torch.Tensor], copy: Path
) -> None:
    """What the tests above do to it is not what makes it unfit."""
    rewritten(copy)
    model, filled = loaded_with_copy(place)
    assert filled == 0
    assert same(model, expected)


@pytest.mark.parametrize("what", ["a pipe", "a folder", "a link to itself", "a link to a device", "empty"])
def test_what_is_no_file_in_the_place_of_a_copy(
    place: Place, expected: dict[str, torch.Tensor], copy: Path, caplog, what: str
) -> None:
    copy.unlink()
    {
        "a pipe": lambda: os.mkfifo(copy),
        "a folder": copy.mkdir,
        "a link to itself": lambda: copy.symlink_to(copy),
        "a link to a device": lambda: copy.symlink_to("/dev/zero"),
        "empty": copy.touch,
    }[what]()
    model, filled = loaded_with_copy(place)
    assert filled == 1
    assert same(model, expected)
    assert copy.name in caplog.text


def test_an_image_of_another_model_is_not_used(
    place: Place, expected: dict[str, torch.Tensor], caplog
) -> None:
    """Same key and same size; the table tells."""
    caplog.set_level(logging.INFO)
    loaded(place)
    model = Model()
    del model.tied
    model.renamed, model.large = model.large, None
    filled: list[object] = []

    def way() -> None:
        filled.append(None)
        model.renamed.data.fill_(1)

    load(place, model, way)
    assert filled
    assert "the pool's image is not used" in caplog.text
    assert (model.renamed == 1).all()


def test_no_pool(expected: dict[str, torch.Tensor], caplog) -> None:
    caplog.set_level(logging.INFO)
    model, filled = loaded(None)
    assert filled == 1
    assert same(model, expected)
    assert caplog.text.count("for this process alone") == 1


def test_a_holder_that_hangs(place: Place, expected: dict[str, torch.Tensor], caplog) -> None:
    """Asked before it hung, it does not answer any more: loaded within bounds, with a line that says so."""
    caplog.set_level(logging.INFO)
    place.pool()
    pool = Pool(place.directory, timeout_s=0.2)
    model = Model()
    wanted = rank_image.Wanted(key="rank-0", label="model", in_recovery=True, unchanged=lambda: True)
    with place.stopped():
        rank_image.load(model, pool, wanted, lambda: fill(model))
    assert same(model, expected)
    assert "for this process alone" in caplog.text


def test_a_holder_that_dies_while_an_image_is_filled(
    place: Place, expected: dict[str, torch.Tensor], caplog
) -> None:
    caplog.set_level(logging.INFO)
    model = Model()

    def way() -> None:
        fill(model)
        place.kill()

    load(place, model, way)
    assert same(model, expected)
    assert "loaded, and not left in the pool" in caplog.text


def test_one_that_is_being_filled_is_waited_for_within_bounds(
    place: Place, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_image, "FOLLOW_S", 0.2)
    layout = layout_of(Model())
    lease = place.pool().open("rank-0", layout.nbytes, kind="rank", label="model", reload_cost_s=1.0)
    model, filled = loaded(place)
    assert filled == 1
    assert same(model, expected)
    assert [entry.state for entry in place.pool().list()] == [EntryState.FILLING]
    lease.close()


# ---- what is left alone ----------------------------------------------------------------------------------------------


def shared(model: Model) -> None:
    model.other = nn.Parameter(model.large.data, requires_grad=False)


def part(model: Model) -> None:
    model.other = nn.Parameter(torch.empty(2, 8)[1:], requires_grad=False)


def transposed(model: Model) -> None:
    model.other = nn.Parameter(torch.empty(2, 8).t(), requires_grad=False)


def meta(model: Model) -> None:
    model.other = nn.Parameter(torch.empty(2, device="meta"), requires_grad=False)


def lazy(model: Model) -> None:
    model.other = nn.UninitializedParameter()


def alias_buffer(model: Model) -> None:
    model.register_buffer("view", model.large.data[0], persistent=False)


def alias_attribute(model: Model) -> None:
    model.views = [model.large.data]


@pytest.mark.parametrize("make", [shared, part, transposed, meta, lazy, alias_buffer, alias_attribute])
def test_what_is_out_of_the_ordinary_is_left_alone(make: Callable[[Model], None]) -> None:
    model = Model()
    assert why_not(model) is None
    make(model)
    assert why_not(model) is not None
