"""The command line: what every backend needs here (`doctor`), what would run for a call and why (`explain`), in which
order a machine tries backends (`route`), what they do to a picture (`compare`), how long they take (`bench`), which
is fastest for a kind of call (`tune`), all of that within a given time (`card`), which blocks a sparse method keeps
(`blocks`), what backends do to clips (`quality`), and what a picture's record says (`replay`); the last seven are in
`comparison/`, the others here.

It reads arguments and prints; what is true is decided in `backends/`. Bad arguments and strict refusals end with
status 2 and their reason on stderr, everything else with 0.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from io import TextIOWrapper

from ..backends.doctor import probe
from ..backends.engine.router import Router
from ..backends.values.bounded import shortened
from ..backends.values.errors import NoBackendError
from ..comparison import bench_command as bench
from ..comparison import blocks_command as blocks
from ..comparison import command as compare
from ..comparison import quality_command as quality
from ..comparison import replay_command as replay
from ..comparison import tune_command as tune
from ..comparison.card import command as card
from ..comparison.card import work as card_part
from . import doctor, explain, route
from .machine import platform_of


def main(argv: list[str], program: str = "python -m attention_backends") -> int:
    """Run one command and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may hold what a cp1252 console cannot show
    if argv[:1] == [probe.CHILD]:
        return probe.child(argv[1:])
    if argv[:1] == [card_part.CHILD]:
        return card_part.child(argv[1:])
    options = _parser(program).parse_args(_joined(argv))
    try:
        measuring = {
            "compare": compare, "bench": bench, "tune": tune, "autotune": tune, "card": card, "blocks": blocks,
            "quality": quality,
        }  # fmt: skip
        if options.command in measuring:
            status: int = measuring[options.command].run(options, program)
        else:
            commands = {"doctor": doctor.run, "explain": explain.run, "route": route.run, "replay": _replay}
            status = commands[options.command](options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader, such as `head`, has enough. Python would complain again when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:  # a command that measures writes what it has, once it has something
        print("interrupted", file=sys.stderr)
        return 130
    except NoBackendError as refusal:
        return _fail(str(refusal), options.json)
    except ValueError as problem:
        return _fail(shortened(" ".join(str(problem).split())), options.json)


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description="Attention backends of this machine, or of any other.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, text: str, epilog: str, aliases: tuple[str, ...] = ()) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            aliases=aliases,
            help=text,
            description=text,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.add_argument("--json", action="store_true", help="print JSON instead of text")
        return added

    doctor.add_arguments(command("doctor", doctor.HELP, doctor.EXAMPLES))
    explain.add_arguments(command("explain", explain.HELP, explain.EXAMPLES))
    route.add_arguments(command("route", route.HELP, route.EXAMPLES))
    compare.add_arguments(command("compare", compare.HELP, compare.EXAMPLES))
    bench.add_arguments(command("bench", bench.HELP, bench.EXAMPLES))
    tune.add_arguments(command("tune", tune.HELP, tune.EXAMPLES, aliases=("autotune",)))
    card.add_arguments(command("card", card.HELP, card.EXAMPLES))
    blocks.add_arguments(command("blocks", blocks.HELP, blocks.EXAMPLES))
    quality.add_arguments(command("quality", quality.HELP, quality.EXAMPLES))
    replay.add_arguments(command("replay", replay.HELP, replay.EXAMPLES))
    return parser


def _joined(argv: list[str]) -> list[str]:
    """Bind the word after --config to it: a configuration may itself begin with `--`."""
    joined = list(argv)
    for index, word in enumerate(joined[:-1]):
        if word == "--config":
            joined[index : index + 2] = [f"--config={joined[index + 1]}"]
            break
    return joined


def _fail(message: str, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"error": message}, indent=2))
    print(message, file=sys.stderr)
    return 2


def _replay(options: argparse.Namespace) -> int:
    record = replay.load(options.file)  # first, since asking a machine takes seconds
    router = Router(platform_of(options.platform))
    return replay.run(options, record, router)
