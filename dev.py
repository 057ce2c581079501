#!/usr/bin/env python3
"""The one entry for people and machines: setup, demo, test, bench, card, lint, doctor, contracts, docs.

Standard library only, so that it runs before anything is installed, on Linux, macOS and Windows, from a
folder of any name, and under an embedded Python. The work is in devtools/.
"""

import sys

# Before any other import: Python 2 has no pathlib, and is to get this sentence too.
if sys.version_info < (3, 10):  # noqa: UP036 - it may be started by an older one
    sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] + ".")

from pathlib import Path

ROOT = Path(__file__).absolute().parent
# An embedded Python leaves the folder of the script out of its path. ComfyUI is never imported in this
# process, so our folders cannot stand in for its modules here.
sys.path.insert(0, str(ROOT))

from devtools.commands import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(ROOT))
