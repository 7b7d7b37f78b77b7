"""`ghostserve models verify MODEL`: every byte of its weights, read from the disk and compared with all that is known of it."""

from __future__ import annotations

import argparse
import json

from ghostserve.cli.models_progress import Bar
from ghostserve.cli.units import bytes_text
from ghostserve.errors import CheckFailed
from ghostserve.weights.places import folder_of
from ghostserve.weights.verify import FileReport, Report, verify_model


def run(options: argparse.Namespace) -> int:
    """Run the command; raises GhostserveError, CheckFailed if something is wrong."""
    folder = folder_of(options.model, revision=options.revision, download_dir=options.download_dir)
    with Bar(options.model) as bar:
        report = verify_model(folder, bar.at)
    if options.json:
        print(json.dumps(as_dict(options.model, report)))
    else:
        for file in report.files:
            print(line_of(file, kept=report.kept))
    wrong = [file for file in report.files if file.error is not None]
    if wrong:
        raise CheckFailed(f"{len(wrong)} of {len(report.files)} files are wrong; the first: {wrong[0].error}")
    return 0


def as_dict(model: str, report: Report) -> dict[str, object]:
    """For programs."""
    return {
        "model": model,
        "path": str(report.model.folder),
        "ok": report.ok,
        "files": [
            {
                "name": file.path.name,
                "bytes": file.nbytes,
                "ok": file.error is None,
                "error": None if file.error is None else str(file.error),
                "compared_with_first_load": file.compared,
                "compared_with_source": file.compared_with_hub,
            }
            for file in report.files
        ],
    }


def line_of(file: FileReport, *, kept: bool) -> str:
    """`ok     model.safetensors  1.2 GiB  as at its first load, and as its source says`."""
    if file.error is not None:
        return f"WRONG  {file.path.name}  {bytes_text(file.nbytes)}  {file.error}"
    known = [
        *(["as at its first load"] if file.compared else []),
        *(["with the SHA-256 of its source"] if file.compared_with_hub else []),
    ]
    new = "its checksums are kept from now on" if kept else "its checksums cannot be kept"
    said = ", and ".join(known) or f"nothing was known of it; {new}"
    return f"ok     {file.path.name}  {bytes_text(file.nbytes)}  {said}"
