"""`route`: which backends `auto` tries on a machine, in which order."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys

from ..backends.doctor import route_report
from ..backends.engine.router import Router
from .machine import EXAMPLE_PLATFORM, platform_of

HELP = "which backends auto tries on a machine, in which order"
EXAMPLES = f"""examples:
  %(prog)s
  %(prog)s --platform "{EXAMPLE_PLATFORM}"
  %(prog)s --platform rocm:gfx942 --json
  %(prog)s --all"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--platform", help="a machine, described as for explain; default: this one")
    parser.add_argument("--all", action="store_true", help="every row of the table, for all kinds of machine")


def run(options: argparse.Namespace) -> int:
    """Print the order; returns the exit status."""
    if options.all:
        rows = route_report.all_routes()
        print(json.dumps({"routes": rows}, indent=2) if options.json else route_report.all_as_text(rows))
        return 0
    router = Router(platform_of(options.platform))
    with contextlib.redirect_stdout(sys.stderr):
        report = route_report.route_report(router)
    print(json.dumps(report, indent=2) if options.json else route_report.as_text(report))
    return 0
