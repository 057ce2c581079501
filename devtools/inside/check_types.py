"""Runs mypy on the folder as the package attention_backends, whatever the folder is called.

    python check_types.py [ARGUMENT OF MYPY ...]

mypy names a module by its path, so it sees a copy in a temporary folder: a link would need rights that Windows does not
give. What we use of ComfyUI and of aiohttp is described in devtools/stubs, whether they are installed or not.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("backends", "cli", "nodes", "comparison", "demo", "integrations", "devtools")
CHECKED = (*FOLDERS, "__init__.py", "__main__.py")


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as place:
        package = Path(place, "attention_backends")
        package.mkdir()
        shutil.copy2(ROOT / "pyproject.toml", place)
        for name in CHECKED:  # with their times, by which mypy knows what it has read before
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(ROOT / name, package)
        cache = ROOT / ".mypy_cache" / "as_package"
        paths = [os.path.join(package.name, name) for name in CHECKED]
        command = [sys.executable, "-m", "mypy", "--cache-dir", str(cache), *arguments, *paths]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    sys.stdout.write(done.stdout.replace(f"{package.name}{os.sep}", ""))
    sys.stderr.write(done.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
