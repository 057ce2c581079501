"""Runs a script with the pack's folder loaded as `attention_backends`, installed or not.

    python with_package.py SCRIPT [ARGUMENT ...]

The folder itself stays off sys.path: its `nodes` would stand in for ComfyUI's.
"""

import importlib.util
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def load() -> None:
    spec = importlib.util.spec_from_file_location(
        "attention_backends", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{ROOT} cannot be loaded as a package")
    package = importlib.util.module_from_spec(spec)
    sys.modules["attention_backends"] = package
    spec.loader.exec_module(package)


if __name__ == "__main__":
    load()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
