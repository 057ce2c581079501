"""The page docs/backends.md: what each backend is, where it runs, what it takes, and the routes.

Made from the declarations that the router itself asks, so it cannot differ from them. Pure: machines are
described and nothing but declarations is imported, so no torch. `python3 dev.py docs` writes it, a test compares it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ...backends.config.systems import systems
from ...backends.engine.priorities import PRIORITIES, Priority
from ...backends.kernels import BACKENDS
from ...backends.kernels.backend import Backend
from ...backends.kernels.group import BackendGroup
from ...backends.values.limits import COLUMNS
from ...backends.values.options import KIND_NAMES, Option
from ...backends.values.reasons import Reason
from .limits import CARDS, MACHINES, card_name, limit_rows, lse_on, runs_on

INTRO = """# Backends

<!-- Made by `python3 dev.py docs` from the code; edit the code, not this page. -->

What each backend is, where it runs and what it takes. These tables are made from what the pack itself asks before it
runs a kernel, so they cannot say something else than the program does. What your own machine has says
`python custom_nodes/attention-backends doctor`, in ComfyUI's folder; which backend one call would get, and why not
another one, says `explain`.

If you only want pictures: leave the backend on `auto`. It takes exact backends alone, in the order of the routes at the
end of this page, and passes over one that cannot run a call.

- **exact**: differs from PyTorch's own attention by rounding only. **quantized**: computes with 8 or 4 bits, faster and
  less precise. **sparse**: skips parts of the work, so it changes the picture most.
- **sm90** is NVIDIA's compute capability 9.0: sm75 Turing, sm80 to sm87 Ampere, sm89 Ada, sm90 Hopper, sm100 to sm121
  Blackwell. **gfx942** and the like are AMD's names of its architectures.
  The tables ask about {cards}.
- **GQA**: several query heads share one key head. **Causal**: a token sees only those before it.
- **LSE**: where it can also give the log-sum-exp of each row's scores, for `attention(..., return_lse=True)`, and what
  such a call may be where that is less.
- Masks: **key_padding** hides some keys from every query, **bool** hides some keys from some queries, **bias** is added
  to the scores."""


def support_page() -> str:
    """The text of docs/backends.md."""
    parts = [
        INTRO.format(cards=", ".join(map(card_name, CARDS))),
        "## What there is",
        _table(
            ("backend", "accuracy", "what it is", "needs", "runs on", "LSE"),
            [_what(backend) for backend in BACKENDS.values()],
        ),
        "## What a call may be",
        _LIMITS_INTRO,
        _table(
            ("backend", "where", *COLUMNS),
            [(_code(backend.id), *row) for backend in BACKENDS.values() for row in _rows_of(backend)],
        ),
        "## Options",
        "What a backend takes under `extra`. One without a row here takes none. A value *by step* is a number, a list "
        "with one for each step (spread over a schedule of another length), or `{from, to, start, end}`: evenly from "
        "one value to the other between two shares of the schedule, by default 0 and 1.",
        _table(
            ("backend", "option", "is", "default", "allowed", "what it does"),
            [_option(backend, option) for backend in BACKENDS.values() for option in backend.options],
        ),
        "## Routes",
        "What `auto` tries, best first; the last one runs everywhere. The second order is tried before the first one "
        "where a person allows more than exact.",
        _table(
            ("machine", "cards", "exact", "where quantized is allowed", "evidence", "source"),
            [_priority_row(priority) for priority in PRIORITIES],
        ),
    ]
    parts += [
        "## Names in other systems",
        "A configuration of one of these pastes unchanged; what differs there is in [systems.md](systems.md).",
        _table(("backend", "names there"), _names()),
    ]
    return "\n\n".join(parts) + "\n"


_LIMITS_INTRO = """A call outside its row is refused with the value and the limit, and another backend runs it. A
backend with several rows has other limits on other machines or with other versions; where a row names none, torch is
2.13 and cuDNN 9.23. **Scale** says whether a call may bring its own; every backend has the usual `head_dim ** -0.5`.
Some refuse a little more on some cards: for one call, `explain` has the last word."""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") or " " for cell in line) + " |" for line in lines)


def _code(text: object) -> str:
    return f"`{text}`"


# What it is and where it runs
def _what(backend: Backend) -> tuple[str, ...]:
    if isinstance(backend, BackendGroup):
        members = [member.id for member in backend.every_member()]
        return (
            _code(backend.id),
            backend.accuracy,
            backend.summary,
            "one of its members",
            f"as {_codes(members)}",
            "as its member",
        )
    needs = ", ".join(_code(need) for need in _needs(backend)) or "nothing"
    accuracy = "that of ComfyUI's function" if backend.hosted else backend.accuracy
    return _code(backend.id), accuracy, backend.summary, needs, runs_on(backend), lse_on(backend)


def _codes(names: Iterable[str]) -> str:
    return ", ".join(_code(name) for name in names)


def _needs(backend: Backend) -> list[str]:
    """Packages and versions: what is declared, and what a machine without packages lacks."""
    needs = dict.fromkeys(need for need in backend.requires if not need.startswith("torch>"))
    for machine in MACHINES:
        if machine.kind not in backend.kinds:
            continue
        poor = replace(machine, torch="0", cudnn=1, packages=())
        for reason in backend.unavailable_reasons(poor):
            if not isinstance(reason, Reason):
                continue
            by = f" ({str(reason.values['by']).upper()})" if reason.id == "package.needed" else ""
            for cause in reason.causes():
                need = _need(cause)
                if need and not (cause.id == "package.missing" and any(known.startswith(need) for known in needs)):
                    needs[need + by] = None
    specifiers: dict[str, list[str]] = {}
    for need in needs:
        name = re.split(r"[<>=!~]", need)[0] if "(" not in need else need
        specifiers.setdefault(name, []).append(need.removeprefix(name))
    return [name + ",".join(filter(None, parts)) for name, parts in specifiers.items()]


def _need(reason: Reason) -> str:
    """What would help against one reason, as a requirement; empty where it is about something else."""
    values = reason.values
    if reason.id == "package.missing":
        return str(values["package"])
    if reason.id == "package.version" and values["package"] == "torch":
        return f"torch{values['specifier']}"
    return str(values.get("needs", ""))


def _rows_of(backend: Backend) -> list[tuple[str, ...]]:
    return [("", "as its member", *[""] * 6)] if isinstance(backend, BackendGroup) else limit_rows(backend)


# Options and routes
def _option(backend: Backend, option: Option) -> tuple[str, ...]:
    allowed = [_code(choice) for choice in option.choices]
    low = [] if option.minimum is None else [f"from {option.minimum:g}"]
    high = [] if option.maximum is None else [f"to {option.maximum:g}"]
    allowed += [" ".join(low + high)] if low or high else []
    allowed += [KIND_NAMES.get(also, _code(also)) if isinstance(also, type) else _code(also) for also in option.also]
    default = "the package's own" if backend.packages else "none"
    default = _code(option.default) if option.default not in (None, "") else default
    return (
        _code(backend.id),
        _code(option.name),
        KIND_NAMES[option.kind] + (", or by step" if option.by_step else ""),
        default,
        ", ".join(allowed) or "any",
        option.summary,
    )


def _priority_row(priority: Priority) -> tuple[str, ...]:
    kinds = ", ".join(kind.upper() if kind != "rocm" else "ROCm" for kind in priority.kinds)
    if priority.capabilities:
        low, high = (".".join(map(str, card)) for card in priority.capabilities)
        kinds += f" {low} to {high}" if priority.capabilities[0] > (0, 0) else f" to {high}"
    lossy = _codes(priority.lossy) if priority.lossy else "the same"
    return priority.title, kinds, _codes(priority.order), lossy, priority.evidence, priority.source


def _names() -> Iterable[tuple[str, ...]]:
    """For each backend that another system names: its names there."""
    for backend in BACKENDS:
        names = {one.title: _codes(row.name for row in one.names if row.means == backend) for one in systems()}
        if any(names.values()):
            yield _code(backend), "; ".join(f"{title}: {codes}" for title, codes in names.items() if codes)
