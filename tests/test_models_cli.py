"""`ghostserve models ls|pin|unpin|rm|stop` over a real holder and real caches, in a home of the test's own."""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import constants

from ghostserve.cli import main as cli
from ghostserve.cli import models
from ghostserve.cli.models import COMMANDS
from ghostserve.cli.models_known import OnDisk, join
from ghostserve.cli.models_ls import pool_line, table
from ghostserve.clock import monotonic_s
from ghostserve.weights import hub
from ghostserve.weights.pool import Hit, Lease, Pool
from ghostserve.weights.pool_start import stop_holder
from ghostserve.weights.pool_types import EntryInfo, EntryState, ImageKind
from ghostserve.weights.pull import pull
from model_server import COMMIT, MODEL, ModelServer, serving, tiny_model
from weights_kit import write_weights

pytestmark = pytest.mark.long

WEIGHTS = "model.safetensors"
BUDGET_BYTES = 64 * 2**20


@dataclass
class Home:
    """What a user has."""

    path: Path
    world: ModelServer

    @property
    def run_directory(self) -> Path:
        return self.path / "run"

    def pulled(self) -> Path:
        """The test server's model, in our cache."""
        return pull(self.world.url, environment={"XDG_CACHE_HOME": str(self.path / "cache")}).path

    def in_memory(self, label: str, *, key: str = "k", nbytes: int = 2**20, kind: str = "rank") -> Hit:
        """An image of the pool, in use until the Hit is closed."""
        pool = Pool.connect(start=True, budget_bytes=BUDGET_BYTES, timeout_s=10)
        assert pool is not None
        lease = pool.open(key, nbytes, kind=kind, label=label, reload_cost_s=1.0)  # type: ignore[arg-type]
        assert isinstance(lease, Lease), lease
        with mmap.mmap(lease.fd, nbytes) as memory:
            memory[:] = b"x" * nbytes
        hit = lease.publish()
        assert isinstance(hit, Hit), hit
        return hit


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("GHOSTSERVE_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with serving(ModelServer(tiny_model(300_001))) as world:
        try:
            yield Home(tmp_path, world)
        finally:
            stop_holder(tmp_path / "run")


def run(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    """What the command prints; with an error, what it says."""
    assert cli.main(["models", *words]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def rows(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    return {row["model"]: row for row in json.loads(run(capsys, "ls", "--json"))}


def test_nothing_is_there(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(run(capsys, "ls", "--json")) == []
    assert "no models" in run(capsys, "ls")
    assert "nothing was held" in run(capsys, "stop")
    for command in ("pin", "unpin", "rm"):
        assert "org/name is not" in run(capsys, command, "org/name", code=1)
    assert not home.run_directory.exists()


def test_a_model_is_one_row_wherever_it_is(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    folder = home.pulled()
    with home.in_memory(str(folder)), home.in_memory(str(folder), key="f", kind="file"):
        row = rows(capsys)[home.world.url]
        nbytes = sum(map(len, home.world.files.values()))
        assert (row["path"], row["disk_bytes"], row["complete"]) == (str(folder), nbytes, True)
        assert (row["tiers"], row["in_use"], row["pinned"]) == (["disk", "memory"], True, False)
        assert row["memory_bytes"] == {"file": 2**20, "rank": 2**20}
        lines = run(capsys, "ls").splitlines()
        assert home.world.url in lines[1]
        assert lines[1].endswith("in use")
        assert lines[-1].startswith("memory: 2.")
        assert "of 64.0 MiB" in lines[-1]


def test_models_of_the_hub_are_listed_and_removed(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    cached = home.path / "hub/models--ghost--tiny"
    folder = cached / "snapshots" / COMMIT
    for part in (folder, cached / "refs", cached / "blobs"):
        part.mkdir(parents=True)
    (cached / "refs/main").write_text(COMMIT)
    (cached / "blobs/b1").write_bytes(b"x" * 1000)
    (folder / "model.safetensors").symlink_to("../../blobs/b1")
    row = rows(capsys)[MODEL]
    assert (row["path"], row["tiers"]) == (str(folder), ["disk"])
    refused = run(capsys, "rm", MODEL, code=2)
    assert "--yes" in refused
    assert str(folder.parents[1]) in refused
    assert "removed" in run(capsys, "rm", MODEL, "--yes")
    assert not folder.exists()
    assert rows(capsys) == {}


def test_pin_and_unpin(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    with home.in_memory("org/name"):
        assert "will not be evicted" in run(capsys, "pin", "org/name")
        assert rows(capsys)["org/name"]["pinned"] is True
        assert json.loads(run(capsys, "unpin", "org/name", "--json")) == {
            "model": "org/name",
            "pinned": False,
            "was_pinned": True,
        }
        assert rows(capsys)["org/name"]["pinned"] is False
        assert "was not pinned" in run(capsys, "unpin", "org/name")
        assert "models warm org/other" in run(capsys, "pin", "org/other", code=1)


@pytest.mark.parametrize("tier", ["--memory", "--disk", None])
def test_rm_takes_the_tier_that_is_named(
    home: Home, capsys: pytest.CaptureFixture[str], tier: str | None
) -> None:
    folder = home.pulled()
    home.in_memory(str(folder)).close()
    run(capsys, "rm", home.world.url, "--yes", *([tier] if tier else []))
    assert folder.exists() == (tier == "--memory")
    row = rows(capsys).get(home.world.url) or rows(capsys).get(str(folder))
    assert (row is None) == (tier is None)
    assert row is None or row["tiers"] == (["disk"] if tier == "--memory" else ["memory"])


def test_rm_needs_no_yes_for_memory_and_says_what_is_still_in_use(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    with home.in_memory("org/name") as hit:
        assert "once its users end" in run(capsys, "rm", "org/name", "--memory")
        assert rows(capsys) == {}
        assert hit.fd >= 0
    assert "not in memory" in run(capsys, "rm", "org/name", "--memory", code=1)


def test_rm_leaves_a_folder_of_the_users_alone(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    mine = home.path / "mine"
    mine.mkdir()
    assert "remove it yourself" in run(capsys, "rm", str(mine), "--disk", "--yes", code=2)
    assert "not on the disk or in memory" in run(capsys, "rm", str(mine), "--yes", code=1)
    home.in_memory(str(mine)).close()
    assert "of memory" in run(capsys, "rm", str(mine), "--yes")
    assert mine.is_dir()


def test_stop_ends_the_holder(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    with home.in_memory("org/name"):
        assert json.loads(run(capsys, "stop", "--json")) == {"stopped": True}
    assert Pool.connect(start=False) is None
    assert rows(capsys) == {}


def test_a_download_that_was_begun_is_shown_as_partial(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = home.pulled()
    (folder.parents[1] / "current.json").unlink()
    assert rows(capsys)[home.world.url]["complete"] is False
    assert "(partial)" in run(capsys, "ls")


# ---- verify and warm: the bytes themselves ----------------------------------------------------------------------------


def test_verify_says_what_is_known_and_finds_a_flipped_byte(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = home.pulled()
    (file,) = json.loads(run(capsys, "verify", home.world.url, "--json"))["files"]
    assert (file["ok"], file["compared_with_first_load"], file["compared_with_source"]) == (True, False, True)
    assert "as at its first load, and with the SHA-256 of its source" in run(capsys, "verify", home.world.url)
    weights = (folder / WEIGHTS).resolve()
    status = weights.stat()
    data = bytearray(weights.read_bytes())
    data[200_000] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))  # as if a disk had done it
    error = run(capsys, "verify", home.world.url, code=1)
    assert WEIGHTS in error
    assert "bytes 0 to 300" in error  # the cell of 4 MiB that it is in


def test_verify_does_not_promise_what_it_could_not_keep(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (home.path / "mine").mkdir()
    write_weights(home.path / "mine" / WEIGHTS, {"a": ("F32", [3])})
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert "checksums cannot be kept" in run(capsys, "verify", str(home.path / "mine"))


def test_a_cache_that_cannot_be_read_is_one_line(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def known(download_dir: Path | None) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/somebody/elses")

    monkeypatch.setattr(hub, "known", known)
    for words in (["ls"], ["rm", "org/name"], ["pin", "org/name"]):
        assert run(capsys, *words, code=1) == "ghostserve: error: /somebody/elses: Permission denied\n"


def test_verify_of_a_folder_trusts_it_the_first_time_and_no_more(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = home.path / "mine"
    mine.mkdir()
    for name, data in home.world.files.items():
        (mine / name).write_bytes(data)
    assert "nothing was known of it" in run(capsys, "verify", str(mine))
    assert "as at its first load" in run(capsys, "verify", str(mine))
    (mine / WEIGHTS).write_bytes(home.world.files[WEIGHTS][:-1])
    assert WEIGHTS in run(capsys, "verify", str(mine), code=1)
    (mine / WEIGHTS).unlink()
    (mine / "pytorch_model.bin").write_bytes(b"pickle")
    assert "never opened" in run(capsys, "verify", str(mine), code=1)


def test_warm_puts_the_files_into_memory_once(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    folder = home.pulled()
    nbytes = len(home.world.files[WEIGHTS])
    first = json.loads(run(capsys, "warm", home.world.url, "--weights-memory", "64Mi", "--pin", "--json"))
    assert (first["memory_bytes"], first["read_bytes"], first["pinned"]) == (nbytes, nbytes, True)
    row = rows(capsys)[home.world.url]
    assert (row["memory_bytes"], row["pinned"], row["in_use"]) == ({"file": nbytes, "rank": 0}, True, False)
    again = json.loads(run(capsys, "warm", home.world.url, "--json"))
    assert (again["memory_bytes"], again["read_bytes"]) == (nbytes, 0)
    pool = Pool.connect(start=False)
    assert pool is not None
    (one,) = pool.list()
    hit = pool.open(one.key, one.nbytes, kind="file", label="x", reload_cost_s=1.0)
    assert isinstance(hit, Hit)
    with hit:
        assert os.pread(hit.fd, nbytes, 0) == (folder / WEIGHTS).read_bytes()


def test_warm_without_room_says_what_to_do(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    home.pulled()
    error = run(capsys, "warm", home.world.url, "--weights-memory", "64Ki", code=1)
    assert "--weights-memory" in error
    assert "0 B of 293.0 KiB are in memory" in error
    assert rows(capsys)[home.world.url]["tiers"] == ["disk"]
    assert "--weights-memory 0: no memory" in run(
        capsys, "warm", home.world.url, "--weights-memory", "0", code=2
    )


def test_what_is_not_here_is_pulled_first(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("verify", "warm"):
        error = run(capsys, command, home.world.url, code=2)
        assert f"ghostserve models pull {home.world.url}" in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "COMMAND"),
        (["list"], "invalid choice"),
        (["pull"], "MODEL"),
        (["rm", "x", "--disk", "--memory"], "not allowed with"),
        (["warm", "x", "--weights-memory", "much"], "not an amount of memory"),
        (["pull", "x", "--download"], "--download"),
    ],
)
def test_usage_errors_are_one_line(
    home: Home, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    error = run(capsys, *words, code=2)
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", [[], ["ls"], ["pull"], ["verify"], ["warm"], ["pin"], ["rm"], ["stop"]])
def test_help(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    assert cli.main(["models", *command, "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: ghostserve models")


def test_the_commands_of_the_guide_are_ours() -> None:
    guide = (Path(__file__).parents[1] / "docs" / "weights.md").read_text()
    named = re.findall(r"^ghostserve models (\w+)(.*?)(?: #.*)?$", guide, re.MULTILINE)
    assert {command for command, _ in named} == set(COMMANDS) - {"unpin"}
    for command, words in named:
        parsed = models._parser().parse_args([command, *re.findall(r"[\w-]+", words)])
        assert parsed.command == command
    for path in re.findall(r"`(tests/[\w/]+\.py)`", guide):
        assert (Path(__file__).parents[1] / path).exists(), path


def test_joining_is_by_name_or_by_folder() -> None:
    disk = OnDisk(model="org/a", folder=Path("/hub/a"), snapshots=(Path("/hub/a/snapshots/1"),), nbytes=5)
    found = join(
        [disk],
        [entry("org/a", 1), entry("/hub/a/snapshots/1", 2), entry("/mine", 4)],
        wall_minus_monotonic_s=0,
    )
    assert [(row.model, row.memory_bytes, row.tiers) for row in found] == [
        ("/mine", {ImageKind.RANK: 4}, ["memory"]),
        ("org/a", {ImageKind.RANK: 3}, ["disk", "memory"]),
    ]
    assert found[1].labels == {"org/a", "/hub/a/snapshots/1"}


def test_the_table_is_aligned() -> None:
    found = join([], [entry("a", 1), entry("a/very/long/name", 2**30)], wall_minus_monotonic_s=0)
    heading, first, second = table(found).splitlines()
    assert heading.index("RANKS IN MEMORY") + len("RANKS IN MEMORY") == first.index("1 B") + 3
    assert second.index("1.0 GiB") + 7 == first.index("1 B") + 3
    assert "holder starts with the first server" in pool_line(None)
    assert pool_line(None, "it hangs") == "memory: it hangs"


def entry(label: str, nbytes: int) -> EntryInfo:
    now_s = monotonic_s()
    return EntryInfo(
        number=1,
        key=label,
        kind=ImageKind.RANK,
        label=label,
        nbytes=nbytes,
        charged_bytes=nbytes,
        state=EntryState.PUBLISHED,
        references=0,
        pinned=False,
        uses=1,
        made_s=now_s,
        used_s=now_s,
    )
