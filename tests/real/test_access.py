"""The surface of a real server: two API keys, an admin key, TLS; whose cache is whose; and what stays in the arena.

One server for all of it. Only the negative control of the salts needs another, without them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

import certificates
from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.web.cache_salt import SALTED_PATHS
from ghostserve.web.key_gate import OPEN_PATHS
from real import kit
from real.kit import PROMPTS, Ask, Door, Served, assert_same

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]
ALICE, BOB, ADMIN = "sk-alice-5f1c", "sk-bob-9d3e", "sk-admin-77aa"
LIMIT = 256 << 10
MEMFDS = ("ghostserve-pool", "ghostserve-staging", "ghostserve-debug")
WINDOW_BYTES = 64


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("access")
    (folder / "keys").write_text(f"{ALICE}\n{BOB}\n")
    (folder / "admin").write_text(f"{ADMIN}\n")
    return folder


@pytest.fixture(scope="module")
def tls(files: Path) -> certificates.Certificates:
    return certificates.make(files)


def start(files: Path, tls: certificates.Certificates, name: str, *flags: str) -> Iterator[Served]:
    served = kit.serve(
        files, name, "--dtype", "float32", "--enforce-eager",
        "--api-key-file", str(files / "keys"), "--admin-api-key-file", str(files / "admin"),
        "--max-body-size", "256Ki", "--enable-scale-out", "--ui", *tls.server_flags, *flags,
        serving="v1-async", door=Door(api_key=ALICE, admin_key=ADMIN, cacert=tls.cacert),
    )  # fmt: skip
    try:
        yield served
    finally:
        served.server.stop()


@pytest.fixture(scope="module")
def served(files: Path, tls: certificates.Certificates) -> Iterator[Served]:
    yield from start(files, tls, "access")


def client(served: Served, key: str | None, *, cacert: bool = True) -> httpx.Client:
    """For whoever holds this key."""
    door = Door(api_key=key, cacert=served.door.cacert if cacert else None)
    http = door.client()
    http.base_url = httpx.URL(served.server.base_url)
    return http


# ---- keys and TLS ----------------------------------------------------------------------------------------------------


def routes(served: Served) -> list[tuple[str, str]]:
    """Every route that vLLM documents, and those of its and ours that it does not."""
    with client(served, ALICE) as http:
        document = http.get("/openapi.json").json()
    known = [
        (m.upper(), re.sub(r"{\w+}", "x", path)) for path, item in document["paths"].items() for m in item
    ]
    ours = [("GET", "/ghostserve/status"), ("POST", "/ghostserve/kill"), ("POST", "/ghostserve/switches"),
            ("POST", "/ghostserve/faults"), ("DELETE", "/ghostserve/faults"), ("GET", "/ui/prompts.json"),
            ("GET", "/ghostserve/events"), ("GET", "/ghostserve/live"), ("POST", "/ghostserve/measure-restart")]  # fmt: skip
    return [*known, *ours, ("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/no/such/route")]


def test_every_route_wants_a_key(served: Served) -> None:
    everything = routes(served)
    assert {("POST", "/invocations"), ("POST", "/tokenize"), ("POST", "/collective_rpc")} <= set(everything)
    for key in (None, "sk-wrong"):
        with client(served, key) as http:
            for method, path in everything:
                status = http.request(method, path).status_code
                assert path in OPEN_PATHS or status == 401, f"{method} {path}: {status}"
            for path in ("/health", "/metrics", "/ping", "/ui"):
                assert http.get(path).status_code == 200, path


def test_with_a_key_what_vllm_does_is_what_vllm_does(served: Served) -> None:
    for key in (ALICE, BOB):
        with client(served, key) as http:
            assert http.get("/v1/models").json()["data"][0]["id"] == "tiny"
            assert http.get("/version").status_code == 200
            asked = {"model": "tiny", "prompt": "def", "max_tokens": 3}
            for path in ("/v1/completions", "/invocations"):
                answer = http.post(path, json=asked)
                assert answer.json()["choices"][0]["finish_reason"] == "length", answer.text
            chat = {"model": "tiny", "messages": [{"role": "user", "content": "def"}], "max_tokens": 3}
            with http.stream("POST", "/v1/chat/completions", json={**chat, "stream": True}) as answer:
                said = answer.read().decode()
            assert answer.status_code == 400 or said.rstrip().endswith("[DONE]")


def test_faults_want_the_admin_key(served: Served) -> None:
    body = {"skip_scrub": False}
    for key, status in ((ALICE, 401), (ADMIN, 200)):
        with client(served, key) as http:
            assert http.post("/ghostserve/switches", json=body).status_code == status
            assert http.get("/ghostserve/status").status_code == 200
            assert http.get("/v1/models").status_code == (200 if key == ALICE else 401)


def test_the_keys_are_shown_nowhere(served: Served) -> None:
    """Given by files, so that neither command line nor environment holds them."""
    served.server.record_processes()
    shown = {
        "log": served.server.log_file.read_text(errors="replace"),
        "status": json.dumps(served.server.status()),
    }
    with client(served, ALICE) as http:
        for path in ("/server_info", "/metrics", "/openapi.json", "/v1/models"):
            shown[path] = http.get(path).text
        shown["refusal"] = http.post("/v1/completions", json={"model": ALICE[:2], "cache_salt": 1}).text
    for process in [
        psutil.Process(served.server.pid),
        *psutil.Process(served.server.pid).children(recursive=True),
    ]:
        for name in ("cmdline", "environ"):
            shown[f"{name} of {process.pid}"] = (
                Path(f"/proc/{process.pid}/{name}").read_bytes().decode(errors="replace")
            )
    assert len(shown) > 12, "no processes were looked at"
    for place, text in shown.items():
        for key in (ALICE, BOB, ADMIN):
            assert key not in text, place


def test_tls_covers_our_routes_and_verbs(served: Served, files: Path) -> None:
    with client(served, ALICE, cacert=False) as http, pytest.raises(httpx.ConnectError, match="certificate"):
        http.get("/ghostserve/status")
    with pytest.raises(httpx.HTTPError):
        httpx.get(served.server.base_url.replace("https", "http") + "/health", trust_env=False)
    (files / "alice").write_text(ALICE)
    verb = [sys.executable, "-m", "ghostserve.cli.main", "status", "--url", served.server.base_url]
    done = subprocess.run(
        [*verb, "--cacert", str(served.door.cacert), "--api-key-file", str(files / "alice")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "serving" in done.stdout


def test_no_other_site_may_read_answers(served: Served) -> None:
    """vLLM 0.32.0 allows no origin by default; here it stays so."""
    with client(served, ALICE) as http:
        for method in ("GET", "OPTIONS"):
            headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "GET"}
            answer = http.request(method, "/v1/models", headers=headers)
            assert "access-control-allow-origin" not in answer.headers, method


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/ghostserve/kill"])
def test_a_body_has_a_greatest_length(served: Served, path: str) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(LIMIT // 1000 + 1):
            yield b" " * 1000

    with client(served, ADMIN if path == "/ghostserve/kill" else ALICE) as http:
        for content in (b" " * (LIMIT + 1), chunks()):
            answer = http.post(path, content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code == 413, answer.text
            assert "bytes" in answer.json()["error"]["message"]


# ---- one cache per key -----------------------------------------------------------------------------------------------


def test_what_takes_a_salt_is_what_gets_one(served: Served) -> None:
    """From vLLM's own document, so that a route that it grows is not forgotten here."""
    with client(served, ALICE) as http:
        document = http.get("/openapi.json").json()
    takes = set()
    for path, item in document["paths"].items():
        body = item.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json", {})
        for name in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(body.get("schema", {}))):
            if "cache_salt" in document["components"]["schemas"][name].get("properties", {}):
                takes.add(path)
    assert "/v1/completions" in takes
    assert {path for path in takes if not path.endswith("/render")} == SALTED_PATHS - {"/invocations"}


def cached(
    served: Served, key: str, prompt: str, *, salt: str | None = None, path: str = "/v1/completions"
) -> int:
    """How many tokens of the prompt were in the cache for the holder of this key."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 1}
    with client(served, key) as http:
        answer = http.post(path, json={**body, "cache_salt": salt} if salt else body)
    assert answer.status_code == 200, answer.text
    details = answer.json()["usage"].get("prompt_tokens_details") or {}
    return int(details.get("cached_tokens") or 0)


def prompt_of_blocks(word: str) -> str:
    """Several blocks long, and nobody else's."""
    return f"# {word}\n" + PROMPTS["json-dump"] * 4


def test_nobody_can_probe_what_another_has_asked(served: Served) -> None:
    prompt = prompt_of_blocks("probe")
    assert cached(served, ALICE, prompt) == 0
    assert cached(served, ALICE, prompt) >= 64, "the cache works"
    assert cached(served, ALICE, prompt, path="/invocations") >= 64, "by whichever route"
    for salt in (None, "guess"):
        assert cached(served, BOB, prompt, salt=salt) == 0
        assert cached(served, BOB, prompt, salt=salt) >= 64, "each has a cache"
    assert cached(served, ALICE, prompt, salt="guess") == 0, "the same salt under another key is another salt"
    assert cached(served, ALICE, prompt, salt="guess") >= 64


def test_it_holds_after_a_recovery(served: Served) -> None:
    prompt, before = prompt_of_blocks("recovery"), served.recoveries()
    assert cached(served, ALICE, prompt) == 0
    ask = Ask(max_tokens=80)
    reference = served.reference(ask)
    served.kill_after(30, 1)
    assert_same(reference, served.run(ask))
    assert served.recovery(after=before)["path"] == "rebuild"
    served.settle()
    assert cached(served, BOB, prompt) == 0
    assert cached(served, ALICE, prompt) >= 64, "what was in the cache came back, under its salt"


@pytest.mark.slow
def test_without_salts_it_can_be_probed(files: Path, tls: certificates.Certificates) -> None:
    """The negative control: what the tests above see is due to the salts."""
    starting = start(files, tls, "no salts", "--no-prefix-cache-salt-per-key")
    shared, prompt = next(starting), prompt_of_blocks("probe")
    try:
        assert cached(shared, ALICE, prompt) == 0
        assert cached(shared, BOB, prompt) >= 64
    finally:
        starting.close()


# ---- nothing stays in the arena --------------------------------------------------------------------------------------


def arena(served: Served) -> dict[str, bytes]:
    """The bytes of the arena as the front process holds it, by segment."""
    found = {}
    folder = Path(f"/proc/{served.server.pid}/fd")
    for entry in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # connections come and go
            name = os.readlink(entry).removeprefix("/memfd:").partition(" ")[0]
            if name in MEMFDS:
                found[name] = entry.read_bytes()
    assert set(found) == set(MEMFDS)
    return found


def windows(pool: bytes, frame_bytes: int) -> list[bytes]:
    """From each frame in use a piece that is unlikely anywhere else."""
    found = []
    for frame in np.frombuffer(pool, np.uint8).reshape(-1, frame_bytes):
        pieces = frame[: frame_bytes // WINDOW_BYTES * WINDOW_BYTES].reshape(-1, WINDOW_BYTES)
        varied = np.flatnonzero((pieces != 0).sum(axis=1) >= WINDOW_BYTES * 3 // 4)
        if varied.size:
            found.append(pieces[varied[0]].tobytes())
    return found


def left_in(served: Served, patterns: list[bytes]) -> int:
    """How many of them are anywhere in the arena."""
    everything = arena(served)
    return sum(any(pattern in segment for segment in everything.values()) for pattern in patterns)


def wait_for_left(served: Served, patterns: list[bytes], *, at_most: int) -> int:
    deadline_s = monotonic_s() + 20
    while (left := left_in(served, patterns)) > at_most and monotonic_s() < deadline_s:
        sleep_s(0.1)
    return left


def wait_for_no_frame_in_use(served: Served) -> None:
    served.wait_now(
        lambda status: status["counters"]["frames_used"] == 0, timeout_s=20, what="no frame in use"
    )


@pytest.fixture
def patterns(served: Served) -> Iterator[list[bytes]]:
    """KV of a request that has ended since, as it was in mirrors and parity while the request was running."""
    served.settle()
    served.post("/reset_prefix_cache")
    wait_for_no_frame_in_use(served)
    taken: list[bytes] = []

    def look() -> None:
        status = served.settle()
        taken.extend(windows(arena(served)["ghostserve-pool"], status["counters"]["frame_bytes"]))
        assert left_in(served, taken) == len(taken)

    assert served.run_with_stops(Ask(max_tokens=100), (60, look)).error is None
    assert len(taken) >= 4, "two mirrors of the tail and parity of sealed blocks"
    yield taken
    served.settle()


def test_what_is_freed_is_wiped(served: Served, patterns: list[bytes]) -> None:
    left = wait_for_left(served, patterns, at_most=len(patterns) - 2)
    assert 0 < left < len(patterns), "mirrors are gone with the request, parity stays with the cached blocks"
    served.post("/reset_prefix_cache")
    wait_for_no_frame_in_use(served)
    assert wait_for_left(served, patterns, at_most=0) == 0
    assert not any(arena(served)["ghostserve-pool"]), "free frames read as zeros"


def test_what_nobody_wipes_is_found(served: Served, patterns: list[bytes]) -> None:
    """The negative control: with the keeper stopped, what was freed is still there, and the test above would say so."""
    keeper = psutil.Process(served.server.status()["keeper"]["pid"])
    before = left_in(served, patterns)
    keeper.suspend()
    try:
        served.post("/reset_prefix_cache")
        wait_for_no_frame_in_use(served)
        assert left_in(served, patterns) == before > 0
    finally:
        keeper.resume()
    assert wait_for_left(served, patterns, at_most=0) == 0
