"""A backend group: one id for several kernels; the first member that this machine can run.

A group holds no kernel. It names its members by their ids, so that kernels need not import one another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ..values.aliases import Alias
from ..values.package import Package
from ..values.platform import Platform
from ..values.reasons import Reason, error_text
from ..values.request import AttentionRequest
from . import registry
from .backend import Backend, Kernel, Limits, LseKernel, needs_device

if TYPE_CHECKING:
    from .support.varlen import VarlenKernel

NOTHING = Backend()
"""The member of a group none of whose members can run."""


class BackendGroup(Backend):
    """Tries its members in an order that depends on the card, and then is the one that could be loaded.

    One member per machine, not per call, so that a measurement of one call is valid for the next.
    """

    by_name_only = True

    def __init__(
        self,
        backend_id: str,
        summary: str,
        order: tuple[str, ...],
        on: Mapping[str, tuple[str, ...]],
        find: Callable[[str], Backend] = registry.find,
        aliases: tuple[Alias, ...] = (),
        tested_on: tuple[str, ...] = (),
    ) -> None:
        """
        Args:
            order: the members' ids, best first.
            on: another order for a name of `Platform.architecture` or a kind.
            find: the backend of an id.
        """
        self.id = backend_id  # type: ignore[misc]  # each instance is its own backend
        self.summary = summary  # type: ignore[misc]
        self.aliases = aliases  # type: ignore[misc]
        self.tested_on = tested_on  # type: ignore[misc]
        self.order = order
        self.on = on
        self.find = find
        self._loaded: dict[Platform, Backend] = {}

    def members(self, platform: Platform) -> tuple[Backend, ...]:
        """The members to try on `platform`, best first."""
        return tuple(map(self.find, self.on.get(platform.architecture or platform.kind, self.order)))

    def every_member(self) -> tuple[Backend, ...]:
        """The members on all machines, each once."""
        return tuple(map(self.find, dict.fromkeys(name for order in (self.order, *self.on.values()) for name in order)))

    @property
    def packages(self) -> tuple[Package, ...]:  # type: ignore[override]  # those of its members
        return tuple(dict.fromkeys(package for member in self.every_member() for package in member.packages))

    @property
    def runs_on(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(kind for member in self.every_member() for kind in member.kinds))

    def unavailable_reasons(self, platform: Platform) -> list[Reason]:
        members = self.members(platform)
        kinds = tuple(dict.fromkeys(kind for member in members for kind in member.kinds))
        if platform.kind not in kinds:
            return [needs_device(kinds, platform)]
        named: dict[Reason, list[str]] = {}
        for member in members:
            why = member.unavailable_reasons(platform)
            if not why:
                return []
            for reason in why:
                named.setdefault(reason, []).append(member.id)
        return [  # what holds for all members is said once, without their names
            reason if len(ids) == len(members) else Reason("named", name=", ".join(ids), reason=reason)
            for reason, ids in named.items()
        ]

    def load(self, platform: Platform) -> Kernel:
        """The kernel of the first member that loads; one that is installed but broken gives way to the next."""
        broken = []
        for member in self.members(platform):
            if member.unavailable_reasons(platform):
                continue
            try:
                kernel = member.load(platform)
            except (Exception, SystemExit) as error:  # whatever a broken package raises
                broken.append(f"{member.id}: {error_text(error)}")
            else:
                self._loaded[platform] = member
                return kernel
        raise ImportError("; ".join(broken))

    def kernel_name(self, request: AttentionRequest, platform: Platform) -> str | None:
        chosen = self._chosen(platform)
        return None if chosen is NOTHING else chosen.kernel_name(request, platform) or chosen.id

    def arithmetic_on(self, platform: Platform) -> str:
        return self._chosen(platform).arithmetic_on(platform)

    def origin(self, platform: Platform) -> str | None:
        return self._chosen(platform).origin(platform)

    def limits_on(self, platform: Platform) -> Limits:
        return self._chosen(platform).limits_on(platform)

    def unsupported_reasons(self, request: AttentionRequest, platform: Platform) -> list[Reason]:
        chosen = self._chosen(platform)
        if chosen is NOTHING:
            return self.unavailable_reasons(platform)
        return chosen.unsupported_reasons(request, platform)

    def varlen_limits(self, platform: Platform) -> Limits | None:
        return self._chosen(platform).varlen_limits(platform)

    def load_varlen(self, platform: Platform) -> VarlenKernel:
        return self._chosen(platform).load_varlen(platform)

    def lse_limits(self, platform: Platform) -> Limits | None:
        return self._chosen(platform).lse_limits(platform)

    def load_lse(self, platform: Platform) -> LseKernel:
        return self._chosen(platform).load_lse(platform)

    def _chosen(self, platform: Platform) -> Backend:
        """The member that was loaded, else the first that can run here, else `NOTHING`."""
        if platform in self._loaded:
            return self._loaded[platform]
        able = (member for member in self.members(platform) if not member.unavailable_reasons(platform))
        return next(able, NOTHING)
