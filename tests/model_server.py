"""A folder of files over HTTP with byte ranges, in a thread of the test; it can fail, cut, stall and change as a test wants.

The same files are there as a model of a Hugging Face hub, `MODEL` at `world.endpoint`."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

PIECE = 2**16
MODEL = "ghost/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class ModelServer:
    """What it serves, how it misbehaves, and what it was asked."""

    files: dict[str, bytes]
    etags: str = "md5"  # md5, sha256, opaque, weak, or none
    ranges: bool = True
    errors: int = 0  # so many requests for weights get 503
    cuts: int = 0  # so many answers with weights end in the middle
    stall_after: int | None = None  # of a file of weights only so many bytes are given until `go_on`
    corrupt: int = 0  # so many answers with weights have a flipped byte
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    weights_sent: int = 0
    go_on: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    endpoint: str = ""
    url: str = ""

    def etag(self, name: str) -> str | None:
        data = self.files[name]
        md5, sha256 = hashlib.md5(data).hexdigest(), hashlib.sha256(data).hexdigest()
        words = {
            "md5": f'"{md5}"',
            "sha256": f'"{sha256}"',
            "opaque": f'"v-{md5[:8]}"',
            "weak": f'W/"{md5[:8]}"',
        }
        return words.get(self.etags)

    def take(self, counter: str) -> bool:
        """Whether one more misbehaviour of this kind is due."""
        with self.lock:
            left: int = getattr(self, counter)
            setattr(self, counter, max(0, left - 1))
            return left > 0


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    world: ModelServer

    def log_message(self, *_words: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        world, name = self.world, self.path.rpartition("/")[2]
        asked = self.headers.get("Range")
        world.asked.append((self.command, name, asked))
        if self.path.startswith("/api/models/"):
            self._hub()
            return
        if name not in world.files or self.path.startswith("/none/"):
            self._head(404, 0)
            return
        weights = name.endswith(".safetensors")
        if weights and with_body and world.take("errors"):
            self._head(503, 0)
            return
        data, etag = world.files[name], world.etag(name)
        if (wanted := self.headers.get("If-Match")) and wanted != etag:
            self._head(412, 0)
            return
        extra = {"ETag": etag} if etag else {}
        if "/resolve/" in self.path:
            extra |= {"X-Repo-Commit": COMMIT, "ETag": f'"{_oid(name, data)}"'}
        start = 0
        if asked and world.ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), int(last) + 1 if last else len(data)
            part = data[start:end]
            extra["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(data)}"
            self._head(206, len(part), extra)
        else:
            part = data
            self._head(200, len(part), extra)
        if with_body:
            self._body(part, start, weights=weights)

    def _hub(self) -> None:
        """The two answers of the Hub's interface that a download needs."""
        path, files = self.path.partition("?")[0].removeprefix("/api/models/"), self.world.files
        if not path.startswith(MODEL):
            self._head(404, 0, {"X-Error-Code": "RepoNotFound"})
            return
        answer: object = {"id": MODEL, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
        if path == f"{MODEL}/tree/{COMMIT}":
            answer = [_entry(name, data) for name, data in files.items()]
        text = json.dumps(answer).encode()
        self._head(200, len(text), {"Content-Type": "application/json"})
        self.wfile.write(text)

    def _head(self, status: int, length: int, extra: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("Last-Modified", "Sun, 22 Nov 2026 12:00:00 GMT")
        for key, value in (extra or {}).items():
            self.send_header(key, value)
        self.end_headers()

    def _body(self, part: bytes, start: int, *, weights: bool) -> None:
        world = self.world
        if not weights:
            self.wfile.write(part)
            return
        if world.take("corrupt"):
            part = bytes([part[0] ^ 1]) + part[1:]
        cut = len(part) // 2 if world.take("cuts") else len(part)
        with contextlib.suppress(OSError):  # the client was killed
            for at in range(0, cut, PIECE):
                if world.stall_after is not None and start + at >= world.stall_after:
                    self.wfile.flush()
                    world.go_on.wait(60)
                piece = part[at : min(at + PIECE, cut)]
                self.wfile.write(piece)
                with world.lock:
                    world.weights_sent += len(piece)
        if cut < len(part):
            self.close_connection = True


def _oid(name: str, data: bytes) -> str:
    """As the Hub names a file: large ones by SHA-256, small ones as git does."""
    if name.endswith(".safetensors"):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(name: str, data: bytes) -> dict[str, object]:
    large = {"lfs": {"oid": _oid(name, data), "size": len(data), "pointerSize": 130}}
    git = {
        "oid": hashlib.sha1(name.encode()).hexdigest() if name.endswith(".safetensors") else _oid(name, data)
    }
    return {
        "type": "file",
        "path": name,
        "size": len(data),
        **git,
        **(large if name.endswith(".safetensors") else {}),
    }


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is part of the test."""


@contextlib.contextmanager
def serving(world: ModelServer) -> Iterator[ModelServer]:
    """`world.url` is a folder on 127.0.0.1 with its files."""
    handler = type("Handler", (_Handler,), {"world": world})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    world.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    world.url = f"{world.endpoint}/models/tiny"
    try:
        yield world
    finally:
        world.go_on.set()
        server.shutdown()
        server.server_close()
        thread.join(10)


def tiny_model(weights_bytes: int = 3_000_001, *, shards: int = 1) -> dict[str, bytes]:
    """Files of a model; the weights are one real tensor per file, of bytes that say where they are."""

    def safetensors(name: str, seed: int) -> bytes:
        header = json.dumps(
            {name: {"dtype": "U8", "shape": [weights_bytes], "data_offsets": [0, weights_bytes]}}
        )
        body = hashlib.sha256(bytes([seed])).digest() * (weights_bytes // 32 + 1)
        return struct.pack("<Q", len(header)) + header.encode() + body[:weights_bytes]

    files = {"config.json": b'{"architectures": ["LlamaForCausalLM"]}', "tokenizer.json": b"{}"}
    if shards == 1:
        return {**files, "model.safetensors": safetensors("t0", 0)}
    names = [f"model-{index + 1:05}-of-{shards:05}.safetensors" for index in range(shards)]
    index = {"weight_map": {f"t{number}": name for number, name in enumerate(names)}}
    weights = {name: safetensors(f"t{number}", number) for number, name in enumerate(names)}
    return {**files, "model.safetensors.index.json": json.dumps(index).encode(), **weights}
