"""The limits of each backend on each kind of machine, as rows of a table: data for `backends.py`.

Each backend is asked about every machine of `MACHINES`, with each package that is known to serve it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

from ...backends.kernels import BACKENDS
from ...backends.kernels.backend import Backend
from ...backends.values.limits import FURTHER, Limits
from ...backends.values.package import Package
from ...backends.values.platform import KINDS, Platform

CARDS = ((5, 0), (7, 0), (7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1))
"""The CUDA cards that backends are asked about."""

NEWEST = Platform("cpu", torch="2.13.0", cuda="13.0", cudnn=92300, os="linux", described=True)
"""What the machines have unless a row says otherwise."""

VARIATIONS: tuple[tuple[str, dict[str, object]], ...] = (
    ("", {}),
    ("torch 2.6", {"torch": "2.6.0"}),
    ("cuDNN 9.10", {"cudnn": 91002}),
)
"""Other versions that some limits depend on."""


def _machines() -> tuple[Platform, ...]:
    cards = [replace(NEWEST, kind="cuda", capability=card) for card in CARDS]
    others = [replace(NEWEST, kind=kind, cuda=None, cudnn=None) for kind in KINDS if kind not in ("cuda", "rocm")]
    architectures = sorted({name for backend in BACKENDS.values() for name in backend.architectures or ()})
    amd = [replace(NEWEST, kind="rocm", gfx=name, cuda=None, cudnn=None) for name in architectures]
    return (*cards, *amd, *others)


MACHINES = _machines()

ANY_VERSION = "1.0"
"""Of a package of which only the presence is asked."""


def equipped(backend: Backend, machine: Platform) -> list[tuple[str, Platform]]:
    """The machine with each package that can serve this backend, one at a time, named if several can.

    What its checks ask about is there too, and of Triton the version that runs on the card.
    """
    triton = "3.6.0" if machine.architecture != "Turing" else "3.2.0"
    others = tuple((name, triton if name.startswith("triton") else ANY_VERSION) for name in backend.asks_for)
    if not backend.packages:
        return [("", replace(machine, packages=others))]
    return [
        (
            _release(package, backend.packages) if len(backend.packages) > 1 else "",
            replace(machine, packages=((package.distribution, package.version), *others)),
        )
        for package in backend.packages
    ]


def _release(package: Package, among: tuple[Package, ...]) -> str:
    """`sageattention 2.2.0`, and whose it is and which post-release where two publish the same one."""
    public, _, local = package.version.partition("+")
    name = f"{package.distribution} {public}"
    same = [other for other in among if f"{other.distribution} {other.version.split('+')[0]}" == name]
    post = "." + local.rpartition(".")[2] if ".post" in local else ""
    return f"{name}{post} of {package.page.split('/')[3]}" if len(same) > 1 else name


def runs_on(backend: Backend) -> str:
    """The machines on which it is available with one package or another."""
    able = []
    for machine in MACHINES:
        with_packages = [one for _, one in equipped(backend, machine)]
        able += [machine] if any(not backend.unavailable_reasons(one) for one in with_packages) else []
    if len(able) == len(MACHINES):
        return "everything"
    return places(able) or "depends on the installed version"


def lse_on(backend: Backend) -> str:
    """The machines on which it gives a log-sum-exp, `yes` for all it runs on, and the limits that differ then."""
    runs, able = [], []
    narrower: dict[str, None] = {}
    for machine in MACHINES:
        for _, one in equipped(backend, machine):
            if backend.unavailable_reasons(one):
                continue
            runs.append(machine)
            if (limits := backend.lse_limits(one)) is not None:
                able.append(machine)
                usual = backend.limits_on(one).described()
                for column, text in limits.described().items():
                    if column == FURTHER:
                        narrower |= dict.fromkeys(part for part in text.split("; ") if part not in usual[column])
                    elif text != usual[column]:
                        narrower[f"{column}: {text}"] = None
    if not able:
        return "no"
    where = "yes" if able == runs else places(list(dict.fromkeys(able)))
    return "; ".join([where, *narrower])


def places(machines: Sequence[Platform]) -> str:
    """`CUDA sm75, sm80 to sm90; ROCm gfx942; CPU`: neighbours in `CARDS` are joined."""
    cards = [machine.capability for machine in machines if machine.capability]
    runs: list[list[tuple[int, int]]] = []
    for card in cards:
        if runs and CARDS.index(card) == CARDS.index(runs[-1][-1]) + 1:
            runs[-1].append(card)
        else:
            runs.append([card])
    parts = []
    if runs:
        spans = [card_name(run[0]) if len(run) == 1 else f"{card_name(run[0])} to {card_name(run[-1])}" for run in runs]
        parts.append("CUDA" if cards == list(CARDS) else f"CUDA {', '.join(spans)}")
    amd = [machine.gfx for machine in machines if machine.gfx]
    if amd:
        every = len(amd) == sum(machine.gfx is not None for machine in MACHINES)
        parts.append("ROCm" if every else f"ROCm {', '.join(filter(None, amd))}")
    parts += [machine.kind.upper() for machine in machines if not machine.capability and not machine.gfx]
    return "; ".join(parts)


def card_name(card: tuple[int, int]) -> str:
    """`sm90` for compute capability (9, 0)."""
    return f"sm{card[0]}{card[1]}"


def limit_rows(backend: Backend) -> list[tuple[str, ...]]:
    """One row per set of limits: the machines and versions that have it, empty where all do, then the limits."""
    groups: dict[tuple[Limits, str], list[Platform]] = {}
    usual: dict[tuple[str, Platform], Limits] = {}
    for (label, changes), machine in product(VARIATIONS, MACHINES):
        for release, one in equipped(backend, machine):
            varied = replace(one, **changes)  # type: ignore[arg-type]  # fields of Platform
            if backend.unavailable_reasons(varied):
                continue
            limits = backend.limits_on(varied)
            if usual.setdefault((release, machine), limits) == limits and label:
                continue
            groups.setdefault((limits, ", ".join(filter(None, (release, label)))), []).append(machine)
    merged = _merge(groups)
    if len({limits for limits, _ in merged}) <= 1:
        merged = [(next((limits for limits, _ in merged), backend.limits), "")]
    return [(where, *_cells(limits, backend.remarks)) for limits, where in merged]


def _cells(limits: Limits, remarks: Sequence[str]) -> tuple[str, ...]:
    cells = limits.described()
    cells[FURTHER] = "; ".join(filter(None, (cells[FURTHER], *remarks)))
    return tuple(cells.values())


def _merge(groups: Mapping[tuple[Limits, str], list[Platform]]) -> list[tuple[Limits, str]]:
    """One row per set of limits, with all the places that have it."""
    rows: dict[Limits, list[str]] = {}
    for (limits, version), machines in groups.items():
        where = places(machines)
        rows.setdefault(limits, []).append(f"{version}: {where}" if version else where)
    return [(limits, "<br>".join(dict.fromkeys(places))) for limits, places in rows.items()]
