"""Opaque ops for models under torch.compile, and handles: numbers in tensors, by which an op finds objects of a host.

A handle is an input of the graph: torch neither compiles its value in nor guards on it.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class Handles(Generic[T]):
    """Numbers for objects, as tensors; an object is not kept alive by its number."""

    def __init__(self) -> None:
        self._objects: weakref.WeakValueDictionary[int, T] = weakref.WeakValueDictionary()
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def new(self, thing: T) -> torch.Tensor:
        """A handle for `thing`: int64, no dimensions, always on the CPU, so that reading it does not wait."""
        import torch

        with self._lock:
            number = next(self._numbers)
            self._objects[number] = thing
        with torch.inference_mode(False):  # guards treat inference tensors as another type
            return torch.tensor(number, dtype=torch.int64, device="cpu")

    def get(self, handle: torch.Tensor | None) -> T | None:
        """The object of a handle; None when it is gone."""
        return None if handle is None else self._objects.get(int(handle))


_libraries: list[Any] = []
"""Holds the torch.library.Library of our ops, made with the first one: they live as long as it."""


def define(
    name: str, schema: str, run: Callable[..., torch.Tensor], fake: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """Make `run` an op. Each copy of this package in a process has its own ops, since it has its own handles.

    `torch.library.custom_op` would do it in one call, but costs another 12 us at each run.
    """
    import torch

    if not _libraries:
        _libraries.append(torch.library.Library("attention_backends", "FRAGMENT"))  # type: ignore[no-untyped-call]
    library = _libraries[0]
    ops = torch.ops.attention_backends
    free = (f"{name}_{n}" if n > 1 else name for n in itertools.count(1))
    name = next(candidate for candidate in free if not hasattr(ops, candidate))
    # Exclude it from CUDA graphs: a replay would skip our Python, so neither schedule nor counting.
    tags = ("pt2_compliant_tag", "cudagraph_unsafe", "needs_exact_strides")
    known = [getattr(torch.Tag, tag) for tag in tags if hasattr(torch.Tag, tag)]
    library.define(name + schema, tags=known)
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attention_backends::{name}", fake, lib=library)
    op: Callable[..., torch.Tensor] = getattr(ops, name).default
    return op
