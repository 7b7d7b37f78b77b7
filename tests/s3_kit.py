"""A bucket on a server that speaks S3 (moto), in a thread of the test."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ghostserve.weights.pull import Pulled, pull
from ghostserve.weights.remote import Patience

BUCKET, URL = "models", "s3://models/team/tiny"
QUICK = Patience(request_s=5.0, retries=1, retry_s=3.0)


@dataclass
class Store:
    """A bucket and the environment that leads to it."""

    client: Any
    environment: dict[str, str]

    def put(self, files: dict[str, bytes], prefix: str = "team/tiny/") -> None:
        for name, data in files.items():
            self.client.put_object(Bucket=BUCKET, Key=prefix + name, Body=data)

    def pull(self, root: Path, url: str = URL) -> Pulled:
        return pull(url, root=root, patience=QUICK, environment=self.environment)


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """The address of a server."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@contextlib.contextmanager
def bucket(server: str) -> Iterator[Store]:
    """An empty one, which is gone afterwards."""
    import boto3

    environment = {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        client = boto3.client("s3", endpoint_url=server)
        client.create_bucket(Bucket=BUCKET)
        yield Store(client, environment)
        for found in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
            client.delete_object(Bucket=BUCKET, Key=found["Key"])
        client.delete_bucket(Bucket=BUCKET)
