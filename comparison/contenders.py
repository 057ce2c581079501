"""Which backends are compared, and how one of them serves as the attention of the embedded model.

Boundary: `backends/` and torch. Names are strict: no other backend runs instead of the one that was asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.config import AttentionConfig, AttentionSpec
from ..backends.config.names import AUTO, AUTOTUNE, COMFY, canonical, options_of
from ..backends.config.text import parse_extra
from ..backends.config.tokens import at_commas
from ..backends.engine.plan import CallKind, Slot
from ..backends.engine.priorities import LAST_RESORT
from ..backends.engine.router import Router
from ..backends.engine.session import Session
from ..backends.engine.sub_calls import calls_of, plan_sub_calls
from ..backends.kernels.registry import detect
from ..backends.observe import observe
from ..backends.report import RunReport
from ..backends.values.devices import device_named, synchronise
from ..backends.values.errors import NoBackendError
from ..backends.values.grid import TokenGrid
from ..backends.values.mask_plan import MaskPlan
from ..backends.values.platform import KINDS
from ..backends.values.request import AttentionCall, AttentionRequest, Host
from .report import ComparisonError

REFERENCE = LAST_RESORT
"""What the others are compared with."""


def parse_backends(names: Sequence[str]) -> list[str]:
    """Ids of the backends that are named, the reference put first; with options behind them where some are given.

    Args:
        names: each a backend's name, which options may follow: `sparge_attn topk=0.25 dense_steps=2`.

    Raises:
        ComparisonError: none is named, one is named twice, or a name is a way to choose and not a backend.
        ConfigError: a backend does not have such an option, or not with this value.
        UnknownBackendError: nothing has that name.
    """
    given: dict[str, str] = {}
    for name in filter(None, (name.strip() for name in names)):
        if "=" in name:
            spec = spec_of(name)
            label = " ".join([spec.backend, *(f"{option}={json.dumps(value)}" for option, value in spec.extra.items())])
            if label in given:
                raise ComparisonError(f"{label} is named twice: name each once")
            given[label] = name
            continue
        backend = canonical(name)
        if backend in (AUTO, AUTOTUNE):
            raise ComparisonError(f"{name} is a way to choose, not a backend: name the backends to compare")
        if options := options_of(name):
            raise ComparisonError(f"{name} includes {', '.join(options)}; options are not compared, name {backend}")
        if backend in given:
            twice = (
                f"{name} is named twice"
                if given[backend] == name
                else f"{given[backend]} and {name} are both {backend}"
            )
            raise ComparisonError(f"{twice}: name each backend once")
        given[backend] = name
    if not given:
        raise ComparisonError("no backends chosen: name at least one, such as sdpa_math")
    return [REFERENCE, *(backend for backend in given if backend != REFERENCE)]


def split_backends(text: str) -> list[str]:
    """The names of a text such as `sdpa_math,sparge_attn topk=0.5`, divided at commas that are not part of a value.

    A value's commas stand in brackets or quotes, or before a digit, as in `dense_layers=0,1`. A comma before `name=` is
    one between options.
    """
    found: list[str] = []
    for piece in at_commas(text):
        if found and (found[-1].count('"') % 2 or ("=" in found[-1] and piece.lstrip()[:1].isdigit())):
            found[-1] += f",{piece}"
        elif found and re.match(r"\s*\w+\s*=", piece):
            found[-1] += f" {piece.strip()}"
        else:
            found.append(piece)
    return found


def spec_of(label: str) -> AttentionSpec:
    """A backend with its options, as `parse_backends` writes it.

    Raises:
        ConfigError, UnknownBackendError: as `parse_backends`.
    """
    name, _, options = label.strip().partition(" ")
    return AttentionSpec(name, parse_extra(options))


def default_backends(router: Router) -> list[str]:
    """What can be compared here without asking: those that run anywhere, and whatever else is available."""
    candidates = {name: backend for name, backend in router.backends.items() if not backend.by_name_only}
    anywhere = [name for name, backend in candidates.items() if backend.kinds == KINDS]
    others = (name for name in candidates if name not in anywhere and not router.unavailable(name))
    return [REFERENCE, *(name for name in (*anywhere, *others) if name != REFERENCE)]


def router_for(device: str | None) -> Router:
    """A router for a device such as `cpu` or `cuda:1`; None for the first accelerator, else the CPU.

    Raises:
        ComparisonError: torch knows no such device, or finds none.
    """
    if device is None:
        return Router(detect())
    try:
        wanted = device_named(device)
        torch.empty(1, device=wanted).fill_(1)
        if wanted.type not in KINDS:
            raise RuntimeError("nothing can be computed there")
    except (AssertionError, RuntimeError) as error:  # torch raises an AssertionError where it is built without CUDA
        raise ComparisonError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return Router(detect(wanted))


class RefusedError(RuntimeError):
    """A backend that was asked for cannot run a call of the model; the message says which and why."""


class Routed:
    """One backend as the `attention` callable that `demo.model` takes; counts what ran and how long.

    A sparse backend computes calls with a token grid; the reference computes its other calls.
    """

    def __init__(self, router: Router, backend: str, grid: TokenGrid | None = None, guard: str | None = None) -> None:
        """`backend`: as in `parse_backends`. `grid`: of the self-attention of the model. `guard`: None: as usual."""
        spec = spec_of(backend)
        self.backend = spec.backend
        self.grid = grid
        sparse = spec.backend in router.backends and router.backends[spec.backend].sparse
        self.beside = Routed(router, REFERENCE, guard=guard) if sparse else None
        config = AttentionConfig(spec, strict=True, guard=guard, source="compare")
        kind = router.platform.kind  # on other devices than the CPU the times are taken here
        run_report = RunReport(device=kind, layers=(config,), mode="full" if kind == "cpu" else "off")
        self.session = observe(Session(router, (config,), run_report))
        self._slots: dict[tuple[str, str, AttentionRequest, object], Slot] = {}
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._counted = 0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, role: str, block: int) -> Tensor:
        return self.run(AttentionCall(query, key, value), role, str(block), grid=self.grid if role == "self" else None)

    def begin(self, samples: Sequence[str]) -> None:
        """A run begins: drop what methods kept of the one before. `samples`: a name for each sample of its batch."""
        self.session.progress.kept.clear()
        self.session.progress.samples = tuple(samples)

    def at_step(self, step: int | None, steps: int) -> None:
        """The sampler begins a step, counted from 0; None: none of a whole schedule."""
        self.session.progress.step, self.session.progress.steps = step, None if step is None else steps

    def run(
        self,
        call: AttentionCall,
        role: str,
        block: str,
        mask_plan: MaskPlan | None = None,
        host: Host | None = None,
        grid: TokenGrid | None = None,
    ) -> Tensor:
        """Run one call with its mask and scale.

        Args:
            grid: how its tokens lie; without one, or for queries alone, a sparse backend leaves it to the reference.
            mask_plan: what `inspect` read in the call's mask, to honour it as in ComfyUI; None to pass
                the mask to the kernel unchanged.

        Raises:
            RefusedError: the backend cannot run it, or it failed.
        """
        if self.beside is None:
            grid = None  # a fact of calls that only sparse backends need
        elif grid is None or grid.queries_only or not grid.cells:
            return self.beside.run(call, role, block, mask_plan, host)
        try:
            slot = self._planned(call, role, block, mask_plan, grid)
            if not call.query.is_cuda:
                return self.session.attention(slot, call, mask_plan, host)
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events.append(events)
            stream = torch.cuda.current_stream(call.query.device)
            events[0].record(stream)
            output = self.session.attention(slot, call, mask_plan, host)
            events[1].record(stream)
            return output
        except NoBackendError as error:
            parts = [] if mask_plan is None else [part.request() for part in mask_plan.calls(call) if part is not None]
            refused = (
                self.session.router.reasons_against(self.backend, request, self.session.failed)
                for request in (*parts, call.request(grid=grid))
            )
            reasons = "; ".join(next(filter(None, refused), (str(error),)))
            raise RefusedError(f"{role} attention of block {block}: {reasons}") from error

    def mask_strategy(
        self, call: AttentionCall, role: str, block: str, mask_plan: MaskPlan | None, grid: TokenGrid | None = None
    ) -> str | None:
        """How the mask of a call that ran was honoured, such as `trimmed`; None where its kernel got it whole."""
        if self.beside is None:
            grid = None
        elif grid is None or grid.queries_only or not grid.cells:
            return self.beside.mask_strategy(call, role, block, mask_plan)
        slot = None if mask_plan is None else self._slots.get((role, block, call.request(grid=grid), mask_plan.facts))
        if mask_plan is None or slot is None or slot.split is None:
            return None
        return mask_plan.strategy if slot.split.varlen is None else f"{mask_plan.strategy}, varlen"

    def _planned(
        self,
        call: AttentionCall,
        role: str,
        block: str,
        mask_plan: MaskPlan | None,
        grid: TokenGrid | None = None,
    ) -> Slot:
        key = role, block, call.request(grid=grid), None if mask_plan is None else mask_plan.facts
        slot = self._slots.get(key)
        if slot is not None:
            return slot

        def planned(part: AttentionCall, mask_text: str = "", grid: TokenGrid | None = None) -> Slot:
            return self.session.plan(CallKind(part.request(grid=grid), role, role, block, mask_text))

        on_host = self.backend == COMFY  # what ComfyUI would run gets ComfyUI's mask
        calls = [] if mask_plan is None or on_host else calls_of(self.session, mask_plan, call, self.backend, grid)
        if mask_plan is None or not calls:
            slot = self._slots[key] = planned(call, grid=grid)
        else:
            slot = self._slots[key] = plan_sub_calls(self.session, mask_plan, call, calls, planned, grid)
        return slot

    def attention_ms(self, device: torch.device) -> float | None:
        """Time in attention since the last call of this method; None on devices where it cannot be measured."""
        beside = None if self.beside is None else self.beside.attention_ms(device)
        if device.type == "cuda":
            synchronise(device)
            events, self._events = self._events, []
            total: float = sum(start.elapsed_time(end) for start, end in events)
            return total + (beside or 0.0)
        before = self._counted
        self._counted = sum(row.nanoseconds for row in self.session.run_report.rows.values())
        return (self._counted - before) / 1e6 + (beside or 0.0) if device.type == "cpu" else None

    @property
    def ran(self) -> str | None:
        """The backend that computed so far, for a group its member; None if none did."""
        rows = self.session.run_report.rows.values()
        return " + ".join(dict.fromkeys(row.member or row.backend for row in rows if row.calls)) or None
