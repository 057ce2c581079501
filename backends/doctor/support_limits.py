"""The limits of each backend on each kind of machine, as rows of a table: data for `support.py`.

Each backend is asked about every machine of `MACHINES`, with each package that is known to serve it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

from ..kernels import BACKENDS
from ..kernels.backend import ANY_MASK, Backend, Limits
from ..values.package import Package
from ..values.platform import KINDS, Platform

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


CUBINS = ("flashinfer-cubin", "0.6.13")
"""Kernels that FlashInfer would else download; nobody else asks for them."""


def equipped(backend: Backend, machine: Platform) -> list[tuple[str, Platform]]:
    """The machine with each package that can serve this backend, one at a time, named if several can."""
    triton = ("triton", "3.6.0" if machine.architecture != "Turing" else "3.2.0")
    packages = backend.packages
    if not packages:
        return [("", replace(machine, packages=(triton,)))]
    return [
        (
            _release(package, packages) if len(packages) > 1 else "",
            replace(machine, packages=((package.distribution, package.version), triton, CUBINS)),
        )
        for package in packages
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
    return [(where, *_limits(limits, backend.remarks)) for limits, where in merged]


def _merge(groups: Mapping[tuple[Limits, str], list[Platform]]) -> list[tuple[Limits, str]]:
    """One row per set of limits, with all the places that have it."""
    rows: dict[Limits, list[str]] = {}
    for (limits, version), machines in groups.items():
        place = places(machines)
        rows.setdefault(limits, []).append(f"{version}: {place}" if version else place)
    return [(limits, "<br>".join(dict.fromkeys(places))) for limits, places in rows.items()]


SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}


def _limits(limits: Limits, remarks: Sequence[str]) -> tuple[str, ...]:
    further = (
        (limits.mixed_head_dims, "values of another head_dim too"),
        (limits.mask_and_causal, "a mask and causal together"),
        (limits.min_kv_len > 1, f"kv_len from {limits.min_kv_len}"),
        (limits.max_kv_len, f"kv_len to {limits.max_kv_len}"),
        (
            limits.kv_block > 1,
            f"kv_len a multiple of {limits.kv_block}" + ("" if limits.kv_block_causal else " unless causal"),
        ),
        (limits.long_kv_block > 1, f"kv_len above {limits.long_kv_block} a multiple of {limits.long_kv_block}"),
        (limits.max_batch, f"batch to {limits.max_batch}"),
        (limits.max_masked_batch, f"batch to {limits.max_masked_batch} with a mask"),
        (limits.max_heads, f"heads to {limits.max_heads}"),
        (limits.max_heads_of_all, f"batch times heads to {limits.max_heads_of_all}"),
        (limits.max_elements, f"{_power(limits.max_elements)} elements per tensor"),
        (limits.max_mask_elements, f"{_power(limits.max_mask_elements)} elements in the mask of one head"),
        (
            limits.correction_block,
            f"heads x blocks of {limits.correction_block} queries x keys padded to {limits.correction_block} "
            "at most 2^31 - 1",
        ),
        *((True, remark) for remark in remarks),
    )
    return (
        ", ".join(SHORT.get(dtype, dtype) for dtype in limits.dtypes),
        _head_dim(limits),
        "all"
        if set(limits.masks) == set(ANY_MASK)
        else ", ".join(mask for mask in limits.masks if mask != "none") or "no",
        "yes" if limits.gqa else "no",
        ("any lengths" if limits.causal_cross else "equal lengths") if limits.causal else "no",
        "yes" if limits.scale else "no",
        "; ".join(text for holds, text in further if holds),
    )


def _power(number: int | None) -> str:
    return "2^31 - 1" if number == 2**31 - 1 else str(number)


def _head_dim(limits: Limits) -> str:
    if limits.head_dims is not None:
        return ", ".join(map(str, limits.head_dims))
    low = f"from {limits.min_head_dim}" if limits.min_head_dim > 1 else ""
    high = f"to {limits.max_head_dim}" if limits.max_head_dim else ""
    parts = [f"{low} {high}".strip() or "any"]
    parts += [f"multiples of {limits.head_dim_multiple}"] if limits.head_dim_multiple > 1 else []
    wide = limits.wide_head_dim_multiple
    parts += [f"above {wide} multiples of {wide}"] if wide > 1 else []
    steps: dict[int, list[str]] = {}
    for dtype, step in limits.head_dim_steps:
        if dtype in limits.dtypes:
            steps.setdefault(step, []).append(SHORT[dtype])
    parts += [f"multiples of {step} in {' and '.join(dtypes)}" for step, dtypes in steps.items()]
    return ", ".join(parts)
