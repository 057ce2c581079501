"""Where browser tests put their pictures of the page, so that a person can look at them."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = "ATTENTION_BACKENDS_PICTURES"
"""Variable that names a folder; without it pictures go with the test's own temporary folder."""


def keep(tmp_path: Path, name: str) -> Path:
    """The path of a picture, its folder made."""
    named = os.environ.get(FOLDER, "").strip()
    folder = Path(named) if named else tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name
