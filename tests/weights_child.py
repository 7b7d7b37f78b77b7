"""A process that reads a file as a loader does and says how it went: told what by JSON on its command line.

It writes "ready N" for every rise of the watermark, and at last one line of JSON.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import sys
import time
from pathlib import Path

from ghostserve.errors import WeightsError
from ghostserve.weights.checksum_file import ChecksumFile
from ghostserve.weights.model_files import open_files
from ghostserve.weights.ranges import Range
from ghostserve.weights.reader import read_ranges


def main(path: Path, order: dict[str, object]) -> dict[str, object]:
    """What is printed."""
    checked, patient_s = bool(order.pop("checked", False)), float(str(order.pop("stall_s", 20.0)))
    began = time.monotonic()
    try:
        model = open_files([path], stall_s=patient_s)
        file = model.files[0]
        book = ChecksumFile(model, folder=path.parent / "sums") if checked else None
        memory = mmap.mmap(-1, file.nbytes)
        stats = read_ranges(
            path,
            [Range(0, file.nbytes, 0)],
            memoryview(memory),
            on_ready=lambda ready: print("ready", ready, flush=True),
            expect=file,
            verify=book.of(file) if book is not None else None,
            stall_s=patient_s,
            **order,  # type: ignore[arg-type]
        )
        if book is not None:
            book.save()
    except WeightsError as error:
        return {
            "error": type(error).__name__,
            "message": str(error),
            "took_s": time.monotonic() - began,
        }
    return {"sha256": hashlib.sha256(memory).hexdigest(), "direct": stats.bytes_direct, "reads": stats.reads}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), json.loads(sys.argv[2]))), flush=True)
