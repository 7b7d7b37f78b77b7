"""The words of `serve`'s command line as vLLM's parser takes them: `--config FILE` spread out, `_` in a flag for `-`. Pure but for the file.

Here again since that parser comes with all of vLLM, which a doctor does not import.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ghostserve.errors import UsageError

CONFIG = "--config"


def spread(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """(the model, if it comes first; all other words). The file's come before the line's, which win. Raises UsageError."""
    words = [_with_dashes(word) for word in argv]
    model = words.pop(0) if words and not words[0].startswith("-") else None
    rest: list[str] = []
    files: list[str] = []
    left = iter(words)
    for word in left:
        if word == CONFIG:
            files.append(next(left, ""))
        elif word.startswith(f"{CONFIG}="):
            files.append(word.partition("=")[2])
        else:
            rest.append(word)
    if len(files) > 1:
        raise UsageError(f"{CONFIG} {files[1]}: name one file, not {len(files)}")
    return model, [*(word for file in files for word in _words_of(file)), *rest]


def _with_dashes(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def _words_of(file: str) -> list[str]:
    if not file.endswith((".yaml", ".yml")):
        raise UsageError(f"{CONFIG} {file}: name a file that ends in .yaml or .yml")
    import yaml

    try:
        found: Any = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{CONFIG} {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{CONFIG} {file}: no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{CONFIG} {file}: write one 'flag: value' a line")
    return [word for name, value in found.items() for word in _words(str(name), value)]


def _words(name: str, value: Any) -> Iterator[str]:
    """As vLLM's `load_config_file` makes them."""
    flag = _with_dashes(f"--{name}")
    match value:
        case True:
            yield flag
        case False:
            yield f"--no-{flag[2:]}"
        case list():
            yield from [flag, *map(str, value)] if value else ()
        case Mapping():
            yield from (flag, json.dumps(value))
        case _:
            yield from (flag, str(value))
