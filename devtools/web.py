"""What the checks of web/ need from npm: `tests/web/node_modules`, made anew when `tests/web/package.json` changes.

Without npm, or where it cannot install, those checks are skipped and say so; nothing else depends on them.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

from .console import say

OPTIONS = ("--no-package-lock", "--no-audit", "--no-fund", "--fetch-retries=1", "--loglevel=error")


def prepare_web(root: Path) -> None:
    folder = root / "tests" / "web"
    stamp = folder / "node_modules" / "prepared.txt"
    wanted = hashlib.sha256((folder / "package.json").read_bytes()).hexdigest()
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return
    npm = shutil.which("npm")
    if npm is None:
        say("npm was not found: the checks of web/ that need its packages are skipped")
        return
    say("Installing what tests/web/package.json names")
    if subprocess.run([npm, "install", *OPTIONS], cwd=folder).returncode != 0:
        say("npm could not install that, see its message above: the checks of web/ that need it are skipped")
        return
    stamp.write_text(wanted, encoding="utf-8")
