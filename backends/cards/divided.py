"""The kernel of a plan whose calls may be divided over cards: runs a part here while other cards run theirs."""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

from ..config.layers import Choice
from ..engine.plan import CallKind
from ..kernels.backend import Kernel
from ..values.errors import NoBackendError
from ..values.faults import is_cuda_fault, is_out_of_memory
from ..values.reasons import Reason, error_text
from ..values.request import AttentionCall
from .card import Asked, Card
from .estimate import Estimate, Times
from .parts import Part, call_of, parts_of, request_of

if TYPE_CHECKING:
    import torch

    from ..engine.router import Decision
    from .heads import HeadsOverCards

Started = tuple[int, Card, Part, "Future[Times]"]
"""Number of a card, the card, its part, the work in its thread."""


class DividedKernel:
    """Calls of one plan, divided as their `Estimate` says."""

    def __init__(
        self, over: HeadsOverCards, kernel: Kernel, kind: CallKind, decision: Decision, choice: Choice
    ) -> None:
        """
        Args:
            kernel: of the home card; it runs whole calls and parts.
            choice: what the other cards are asked for.
        """
        self.over = over
        self.kernel = kernel
        self.kind = kind
        self.decision = decision
        self.choice = choice
        self._estimate: Estimate | None = None
        self._noted: set[str] = set()
        """Why calls stayed on the home card so far."""
        self._refused: dict[tuple[int, ...], bool] = {}

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        """(batch, num_heads, q_len, v_head_dim), the same to the bit as of each card's kernel."""
        over = self.over
        if over.off is not None:
            return self.kernel(call)
        needed = _needs_one_card(call)
        if needed is not None:
            self._stays(Reason(needed))
            return self.kernel(call)
        over.clock.collect()
        if self._estimate is None:
            self._estimate = over.estimate(call, self.kind, self.decision)
            if over.off is not None:
                return self.kernel(call)
        estimate = self._estimate
        counts = estimate.next()
        if counts is None or self._refuses_parts(estimate, counts):
            return self._whole(call, estimate)
        return self._divided(call, estimate, counts)

    def _whole(self, call: AttentionCall, estimate: Estimate) -> torch.Tensor:
        if estimate.times_whole:
            token = self.over.clock.start(call.query.device)
            output = self.kernel(call)
            self.over.clock.stop(token, lambda milliseconds: estimate.add_whole(milliseconds / 1e3))
            return output
        if estimate.refusal is not None:
            self._stays(estimate.refusal)
        return self.kernel(call)

    def _stays(self, reason: Reason) -> None:
        """Have the run report say once why such calls stay on the home card."""
        if reason not in self._noted:
            self._noted.add(reason)
            self.over.keep_home(self.kind, self.decision.backend, reason)

    def _refuses_parts(self, estimate: Estimate, counts: tuple[int, ...]) -> bool:
        """Whether the home card's backend cannot run its part; such calls are divided no more then."""
        known = self._refused.get(counts)
        if known is None:
            part = parts_of(counts, self.kind.request)[0]
            request = None if part is None else request_of(part, self.kind.request)
            router, decision = self.over.router, self.decision
            reasons = (
                () if request is None
                else router.reasons_against(decision.backend, request, options=decision.options)
            )  # fmt: skip
            known = self._refused[counts] = bool(reasons)
            if reasons:
                estimate.refuse(Reason("cards.part_refused", error=tuple(reasons)))
        return known

    def _divided(self, call: AttentionCall, estimate: Estimate, counts: tuple[int, ...]) -> torch.Tensor:
        over = self.over
        clock, device = over.clock, call.query.device
        home, *others = parts_of(counts, self.kind.request)
        total = clock.start(device)
        output = _output_of(call)  # before the cards begin: they write when earlier work on its memory is done
        started: list[Started] = []
        here: list[float] = []
        failed: Exception | None = None
        try:
            for at, (card, part) in enumerate(zip(over.cards, others, strict=True)):
                if part is not None:
                    started.append((at, card, part, self._begin(card, part, call, output)))
            if home is not None:
                token = clock.start(device)
                output[:, home.heads] = self.kernel(call_of(home, call))
                clock.stop(token, here.append)
        except Exception as error:
            if is_out_of_memory(error) or is_cuda_fault(error):
                raise
            failed = error
        finally:  # in any case: the cards read and write these tensors
            ended = [(at, card, part, self._end(card, future)) for at, card, part, future in started]
        if failed is not None:  # a kernel may refuse a part and take the whole
            estimate.refuse(Reason("cards.part", error=error_text(failed)))
            return self.kernel(call)
        times = {}
        for at, card, part, ran in ended:
            if isinstance(ran, Times):
                times[at] = ran
                continue
            if isinstance(ran, NoBackendError):
                estimate.refuse(Reason("cards.refused", error=str(ran).partition("\n")[0]))
            else:
                over.leave_out(card, ran)
            output[:, part.heads] = self.kernel(call_of(part, call))

        def add(milliseconds: float) -> None:
            estimate.add_divided(counts, milliseconds / 1e3, here[0] / 1e3 if here else None, times)

        if len(times) == len(ended):
            clock.stop(total, add)
        return output

    def _begin(self, card: Card, part: Part, call: AttentionCall, output: torch.Tensor) -> Future[Times]:
        request = request_of(part, self.kind.request)
        mine, target = call_of(part, call), output[:, part.heads]
        backend = self.over.router.backends[self.decision.backend]
        size = mine.query.nbytes + mine.key.nbytes + mine.value.nbytes + target.nbytes
        size += 0 if mine.attn_mask is None else mine.attn_mask.nbytes
        self.over.ask_for_room(card, size + backend.workspace_bytes(request, self.over.router.platform))
        asked = Asked(self.kind._replace(request=request), self.choice)
        return card.transport.begin(partial(card.compute, asked, mine, target))

    def _end(self, card: Card, future: Future[Times]) -> Times | BaseException:
        try:
            return card.transport.end(future)
        except Exception as error:  # out of memory, a fault, no backend: the part is computed here
            return error


def _needs_one_card(call: AttentionCall) -> str | None:
    """The id of the reason where gradients are needed or a CUDA graph is captured, else None."""
    import torch

    query = call.query
    if torch.is_grad_enabled() and (query.requires_grad or call.key.requires_grad or call.value.requires_grad):
        return "cards.gradients"
    return "cards.captured" if query.is_cuda and torch.cuda.is_current_stream_capturing() else None


def _output_of(call: AttentionCall) -> torch.Tensor:
    """An empty output; in memory (batch, q_len, num_heads, v_head_dim), as callers join the heads."""
    import torch

    batch, num_heads, q_len, _ = call.query.shape
    shape = (batch, q_len, num_heads, call.value.shape[3])
    return torch.empty(shape, dtype=call.query.dtype, device=call.query.device).transpose(1, 2)
