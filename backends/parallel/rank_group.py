"""`RankGroup`: the ranks of a torch.distributed group: moves tensors between them, stops all with one reason.

Tensors on the CPU, and the few numbers that every call exchanges, go over a gloo group that is made here, once for
each group: dropping it closes its connections, so that no other rank waits for this one. Tensors on other devices go
over the group itself, or over the CPU where that is a gloo group. A rank that fails first writes its reason to the
group's store.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate
from math import prod
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

from ..engine.call_checks import CheckError
from ..values.errors import GroupError
from ..values.reasons import error_text

if TYPE_CHECKING:
    import torch

    from .strategy import Link

log = logging.getLogger("attention_backends")

LOOK_EVERY = timedelta(seconds=1)
"""How often a rank that waits for others looks for a reason in the store."""
ANSWER_WITHIN = 2.0
"""Seconds in which ranks that lost a connection expect a word of the others."""
KEY = "attention_backends"

Shape = tuple[int, ...]


class AgreedError(Exception):
    """Wraps an error that every rank raises for the same call: the group goes on."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class RankGroup:
    """The ranks of one group. One thread of a process uses it."""

    def __init__(self, group: Any) -> None:
        """Collective: every rank of the group makes one, with its first call."""
        from torch import distributed

        self.group = group
        self.rank: int = distributed.get_rank(group)
        self.size: int = distributed.get_world_size(group)
        self.calls = 0
        """Calls so far; the same on every rank."""
        self.agreed: dict[object, Any] = {}
        """What all ranks have agreed on, by kind of call; changed on all of them at once."""
        self.link: Link | None = None
        """What the group can do; None: not measured yet. The same on every rank."""
        self.failed: str | None = None
        """Why the group has stopped; None while it works."""
        self.stages = distributed.get_backend(group) == "gloo"
        """Whether tensors of other devices go over the CPU."""
        store = _store_of(group)
        # This folder can be loaded twice in one process.
        number = store.add(f"{KEY}/made by {self.rank}", 1)
        self.store = _below(f"{KEY}/{number}", store)
        self.control: Any = None
        if self.stages:  # notices a rank that ends before its first call
            self.wait(distributed.barrier(group, async_op=True))
        # Not of `new_group`: a group made there is known to torch, which keeps its connections open.
        self.control = distributed.ProcessGroupGloo(
            _below("gloo", self.store), self.rank, self.size, timedelta(minutes=30)
        )

    @contextmanager
    def call(self) -> Iterator[None]:
        """One call of the group: what is raised inside stops every rank, unless all of them raise it.

        Raises:
            GroupError: this rank or another one has failed; the text has the rank and its reason.
        """
        if self.failed is not None:
            raise GroupError(self.failed)
        self.calls += 1
        try:
            yield
        except AgreedError as agreed:
            raise agreed.error from agreed.error.__cause__
        except GroupError:
            raise
        except BaseException as error:
            self.fail(f"{type(error).__name__}: {error_text(error)}")
            raise

    def fail(self, text: str) -> None:
        """Stop the group: write the reason of this rank to the store, where no other rank did, and drop connections."""
        self.failed = f"rank {self.rank}: {text}"
        try:
            self.store.compare_set("failed", "", self.failed)
        except Exception as error:  # the store's process has ended
            log.warning("the reason %r could not be written to the group's store: %s", self.failed, error)
        self._drop()

    def _drop(self) -> None:
        """Close the connections; in a thread, as an operation that waits for another rank may be under way."""
        controls, self.control = [self.control], None
        if controls[0] is not None:
            threading.Thread(target=_close, args=(controls, None if self.stages else self.group), daemon=True).start()

    def reason(self) -> str | None:
        """The reason that a rank wrote to the store; None without one."""
        if self.store.check(["failed"]):
            return str(self.store.get("failed").decode())
        return None

    def _stopped(self, error: Exception) -> GroupError:
        """The error for a connection that was lost; waits shortly for the reason of the rank that closed it."""
        text, cause = None, str(error).split(". This is")[0]
        try:
            self.store.set(f"lost/{self.rank}", "1")
            until = monotonic() + ANSWER_WITHIN
            while (text := self.reason()) is None and monotonic() < until:
                sleep(0.05)
            if text is None:
                others = (rank for rank in range(self.size) if not self.store.check([f"lost/{rank}"]))
                missing = ", ".join(map(str, others))
                text = f"the connection to another rank was lost; no answer from rank {missing or 'any'} ({cause})"
                self.store.compare_set("failed", "", text)
                text = self.reason() or text
        except Exception as of_store:
            text = text or (
                "the connection to another rank was lost, and the group's store does not answer: the process that has "
                f"it, often rank 0, ended ({cause}; {of_store})"
            )
        self.failed = text
        self._drop()
        return GroupError(text)

    def wait(self, work: Any) -> None:
        """Wait for an operation between CPUs.

        Raises:
            GroupError: another rank failed or ended.
        """
        while True:
            try:
                work.wait(LOOK_EVERY)
                return
            except Exception as error:
                if work.is_completed():
                    raise self._stopped(error) from error
                try:
                    text = self.reason()
                except Exception as of_store:
                    raise self._stopped(of_store) from error
                if text is not None:
                    self.failed = text
                    self._drop()
                    raise GroupError(text) from None

    def numbers(self, mine: Sequence[int]) -> list[list[int]]:
        """The numbers of every rank, from -2**63 to 2**63 - 1; all ranks give equally many."""
        import torch

        given = torch.tensor(mine, dtype=torch.int64)
        found = self.exchange([[given]] * self.size, [[(len(mine),)]] * self.size)
        return [tensors[0].tolist() for tensors in found]

    def texts(self, mine: str) -> list[str]:
        """The text of every rank."""
        import torch

        data = torch.frombuffer(bytearray(mine.encode() or b"\0"), dtype=torch.uint8)[: len(mine.encode())]
        lengths = [row[0] for row in self.numbers([len(data)])]
        found = self.exchange([[data]] * self.size, [[(length,)] for length in lengths])
        return [bytes(tensors[0].tolist()).decode() for tensors in found]

    def objects(self, mine: Any) -> list[Any]:
        """Plain data of every rank, as JSON."""
        return [json.loads(text) for text in self.texts(json.dumps(mine))]

    def exchange(
        self, sends: Sequence[Sequence[torch.Tensor]], shapes: Sequence[Sequence[Shape]]
    ) -> list[list[torch.Tensor]]:
        """Send tensors to each rank, and receive some from each.

        Args:
            sends: for each rank, tensors of one dtype.
            shapes: for each rank, the shapes of the tensors that it sends here.

        Returns:
            The tensors from each rank: contiguous parts of one buffer.
        """
        found: list[list[torch.Tensor]] = self.begin_exchange(sends, shapes)()
        return found

    def begin_exchange(self, sends: Sequence[Sequence[torch.Tensor]], shapes: Sequence[Sequence[Shape]]) -> Any:
        """Begin an `exchange`; returns the function that waits for it and gives its result."""
        import torch
        from torch import distributed

        flat = [torch.cat([tensor.reshape(-1) for tensor in tensors]) for tensors in sends]
        dtype, device, item = flat[0].dtype, flat[0].device, flat[0].dtype.itemsize
        to = torch.cat(flat)
        counts = [sum(map(prod, of_rank)) for of_rank in shapes]
        direct = device.type == "cpu" or not self.stages
        to = (to if direct else to.cpu()).view(torch.uint8)
        got = torch.empty(sum(counts) * item, dtype=torch.uint8, device=to.device)
        sizes = [count * item for count in counts], [each.numel() * item for each in flat]
        on_cpu = to.device.type == "cpu"
        if on_cpu:
            work = self._begun(lambda: self.control.alltoall_base(got, to, *sizes))
        else:
            work = distributed.all_to_all_single(got, to, *sizes, group=self.group, async_op=True)

        def finish() -> list[list[torch.Tensor]]:
            if on_cpu:
                self.wait(work)
            else:
                work.wait()  # of the stream: it does not wait here
            buffer = got.view(dtype).to(device)
            made, start = [], 0
            for of_rank in shapes:
                ends = list(accumulate(map(prod, of_rank), initial=start))
                made.append([buffer[a:b].view(shape) for a, b, shape in zip(ends[:-1], ends[1:], of_rank, strict=True)])
                start = ends[-1]
            return made

        return finish

    def _begun(self, operation: Any) -> Any:
        if self.control is None:
            raise GroupError(self.failed or "the group has stopped")
        try:
            return operation()
        except Exception as error:  # a connection that is known to be closed
            raise self._stopped(error) from error


def _store_of(group: Any) -> Any:
    from torch import distributed

    if hasattr(group, "get_group_store"):
        return group.get_group_store()
    # Torch before 2.6.
    return _below(f"{KEY}/{group.group_name}", distributed.distributed_c10d._get_default_store())


def _below(prefix: str, store: Any) -> Any:
    from torch import distributed

    return distributed.PrefixStore(prefix, store)  # type: ignore[attr-defined]  # documented, and not in __all__


def _close(controls: list[Any], aborted: Any) -> None:
    """Close a gloo group's connections, and abort another group, whose operations would wait on the device."""
    controls.clear()  # its last reference
    if aborted is not None:
        try:
            aborted.abort()
        except Exception as error:
            log.debug("while a group of ranks stopped: %s", error)


_rank_groups: dict[int, RankGroup] = {}
"""By the id of the group, which a `RankGroup` keeps alive."""


def rank_group(group: Any) -> RankGroup:
    """The ranks of `group`, a torch.distributed ProcessGroup or a DeviceMesh of one dimension.

    Raises:
        CheckError: it is neither, torch.distributed is not initialised, or this process is none of its ranks.
    """
    known = _rank_groups.get(id(group))
    if known is not None:
        return known
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized():
        raise CheckError("group: torch.distributed is not initialised; call torch.distributed.init_process_group first")
    found = group
    if not isinstance(group, distributed.ProcessGroup) and getattr(group, "ndim", None) == 1:
        found = group.get_group()
    if not isinstance(found, distributed.ProcessGroup):
        raise CheckError(
            f"group {type(group).__name__} is neither a torch.distributed ProcessGroup, such as "
            "torch.distributed.group.WORLD, nor a DeviceMesh of one dimension"
        )
    if found is not group:
        return rank_group(found)
    if distributed.get_rank(found) < 0:
        raise CheckError("group: this process is none of its ranks")
    made = _rank_groups[id(group)] = RankGroup(group)
    return made
