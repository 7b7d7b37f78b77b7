"""The pictures of the page: each is shown somewhere, each that is shown is there, and README leads with the film."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image, ImageSequence

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
SHOWN_IN = ("README.md", "docs/page.md")
STATES = ("idle", "streaming", "recovering", "recovered", "mismatch", "reconnecting")
LOOKS = ("light", "dark", "narrow")
FILM_BYTES_MAX, FILM_S = 1_500_000, (8.0, 20.0)


def shown(document: str) -> set[Path]:
    """What the document shows or links of our pictures."""
    links = re.findall(r"\]\(((?:docs/)?pictures/[^)]+)\)", (ROOT / document).read_text())
    return {((ROOT / document).parent / link).resolve() for link in links}


def test_pictures_are_there_and_shown() -> None:
    wanted = {
        PICTURES / "kill.webp",
        *(PICTURES / f"{state}-{look}.png" for state in STATES for look in LOOKS),
    }
    assert set(PICTURES.iterdir()) == wanted
    assert set.union(*(shown(document) for document in SHOWN_IN)) == wanted


def test_readme_leads_with_the_film() -> None:
    first = re.search(r"!\[([^]]+)\]\(([^)]+)\)", (ROOT / "README.md").read_text().partition("\n## ")[0])
    assert first is not None
    path = ROOT / first[2]
    assert path.stat().st_size < FILM_BYTES_MAX
    with Image.open(path) as film:
        durations_ms = []
        for frame in ImageSequence.Iterator(film):
            frame.load()
            durations_ms.append(frame.info["duration"])
    assert len(durations_ms) > 20
    assert FILM_S[0] <= sum(durations_ms) / 1000 <= FILM_S[1]
