"""One backend for a call on all ranks: each proposes what it can run; the same function of all proposals decides.

A rank proposes for the calls that it computes. A backend that failed on one rank, that a probe found broken there or
that the guard refuses there, is refused on all, with that rank's reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..config.layers import Choice
from ..config.names import AUTOTUNE
from ..engine.plan import CallKind
from ..engine.router import NO_OPTIONS, Decision, Rejection
from ..values.errors import NoBackendError
from ..values.reasons import Reason
from ..values.request import AttentionRequest
from ..values.tolerance import ACCURACY

if TYPE_CHECKING:
    from .group_session import GroupSession

Proposal = dict[str, Any]
"""`reasons`: backend -> why this rank cannot run it, in the order in which it would try them; `asked`, `strict`."""


@dataclass
class Agreed:
    """What all ranks run for one kind of call. Changed on all ranks at once."""

    backend: str
    asked: str | None
    rejected: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Backends that come before it, with the reasons of the first rank that refuses each."""
    confirmed: bool = False
    """A call ran with it on every rank."""
    exact_because: str | None = None
    """Why only exact backends may run: the guard's reason on some rank."""

    def decision(self, choice: Choice) -> Decision:
        """For plans and rows of this rank."""
        rejected = tuple(Rejection(backend, reasons) for backend, reasons in self.rejected)
        options = choice.extra if self.backend == choice.asked else NO_OPTIONS
        return Decision(
            self.backend, choice.source, choice.asked, rejected, options, choice.extra, accuracy=choice.accuracy
        )


def named(choice: Choice) -> str | None:
    """The backend that was asked for by name."""
    return None if choice.asked == AUTOTUNE else choice.asked


def proposal(
    session: GroupSession, requests: Sequence[AttentionRequest], choice: Choice, kind: CallKind,
    exact_because: str | None = None,
) -> Proposal:  # fmt: skip
    """What this rank can run for all of `requests`; without requests it can run everything.

    Args:
        kind: role and block of the call.
        exact_because: why inexact backends are refused; None: they are not.
    """
    router, settings = session.router, session.settings
    accuracy = choice.accuracy or settings.accuracy
    allowed = ACCURACY[: ACCURACY.index(accuracy) + 1]
    lossy = () if accuracy == "exact" else router.priority.lossy
    asked = named(choice)

    def reasons_against(backend_id: str) -> tuple[str, ...]:
        is_asked, backend = backend_id == asked, router.backends.get(backend_id)
        options = choice.extra if is_asked else NO_OPTIONS
        for request in requests:
            reasons = router.reasons_against(backend_id, request, session.failed, options)
            if reasons:
                return reasons
            if backend is None:
                continue
            if not is_asked and backend.accuracy not in allowed:
                return (Reason("accuracy.not_allowed", accuracy=backend.accuracy),)
            if not is_asked and (avoided := backend.avoid_reasons(request, router.platform)):
                return tuple(avoided)
            if exact_because is not None and backend.accuracy != "exact":
                return (exact_because,)
            if veto := session.refused(kind._replace(request=request), backend.accuracy):
                return (veto,)
        return ()

    order = dict.fromkeys([*([asked] if asked else []), *lossy, *router.priority.order])
    reasons = {backend_id: list(map(str, reasons_against(backend_id))) for backend_id in order}
    strict = settings.strict and exact_because is None
    if asked and strict and choice.for_all_roles and asked in router.backends:
        strict = not router.backends[asked].is_not_for(kind.category, reasons_against(asked))
    return {"asked": asked, "strict": strict, "reasons": reasons, "call": requests[0].describe() if requests else ""}


def combined(proposals: Sequence[Proposal], exact_because: str | None = None) -> Agreed:
    """The first backend that no rank refuses, in the order of the ranks.

    Raises:
        NoBackendError: strict, and some rank refuses the backend that was asked for; or there is none.
    """
    asked = proposals[0]["asked"]
    order = dict.fromkeys(backend for one in proposals for backend in one["reasons"])
    rejected: list[tuple[str, tuple[str, ...]]] = []
    for backend in order:
        against = _against(backend, proposals)
        if not against:
            return Agreed(backend, asked, tuple(rejected), exact_because=exact_because)
        rejected.append((backend, against))
        if backend == asked and any(one["strict"] for one in proposals):
            break
    lines = [f"  {backend}: {'; '.join(reasons)}" for backend, reasons in rejected]
    calls = [f"  rank {rank}: {one['call']}" for rank, one in enumerate(proposals) if one["call"]]
    strictly = f" ({asked} was asked for strictly)" if rejected[-1][0] == asked else ""
    raise NoBackendError(
        "\n".join([f"no backend runs this call on all {len(proposals)} ranks{strictly}", *calls, *lines])
    )


def _against(backend: str, proposals: Sequence[Proposal]) -> tuple[str, ...]:
    """The reasons of the first rank that refuses a backend; empty where none does."""
    for rank, one in enumerate(proposals):
        reasons = one["reasons"].get(backend, [Reason("parallel.unlisted")])
        if reasons:
            return tuple(Reason("named", name=f"rank {rank}", reason=str(reason)) for reason in reasons)
    return ()


def failure_of(texts: Sequence[Mapping[str, Any]]) -> tuple[str, bool] | None:
    """The first failure that ranks report, with its rank, and whether the guard refused; None without one."""
    for rank, one in enumerate(texts):
        if one.get("error"):
            return f"rank {rank}: {one['error']}", bool(one.get("veto"))
    return None
