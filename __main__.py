"""Runs the command line: `python -m attention_backends`, or `python path/to/this/folder` without installing it.

Run as a folder, this file is not part of a package yet, so it loads the folder as `attention_backends` whatever
it is called.
"""

from __future__ import annotations

import importlib.util
import os
import sys

FOLDER = os.path.dirname(os.path.realpath(__file__))


def _load_package() -> None:
    spec = importlib.util.spec_from_file_location(
        "attention_backends", os.path.join(FOLDER, "__init__.py"), submodule_search_locations=[FOLDER]
    )
    if spec is None or spec.loader is None:
        sys.exit(f"{FOLDER} cannot be loaded as a package")
    package = importlib.util.module_from_spec(spec)
    sys.modules["attention_backends"] = package
    spec.loader.exec_module(package)


# Python puts a folder that it runs on the path, where our `nodes` would stand in for ComfyUI's own.
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or os.curdir) != FOLDER]

if __package__:
    from .cli import main

    PROGRAM = f"python -m {__package__}"
else:
    _load_package()
    from attention_backends.cli import main

    PROGRAM = f"python {sys.argv[0]}"

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], PROGRAM))
