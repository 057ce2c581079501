"""The operators that another pack's function runs, watched to tell whether it computes attention.

A patch that skips a block, or adds a cached result of an earlier step, looks from outside like one that computes
attention: no call reaches our hook. `Work` distinguishes them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from .attention_modules import current
from .hook_calls import run_hook_call


@contextmanager
def counted_elsewhere() -> Iterator[None]:
    """Another pack's override is counted elsewhere: watches around it ignore its operators."""
    works = _works()
    works.append(None)
    try:
        yield
    finally:
        works.pop()


def _works() -> list[Work | None]:
    """The watches of this thread, innermost last; None for a part that is counted elsewhere."""
    found: list[Work | None] | None = getattr(current, "works", None)
    if found is None:
        found = current.works = []
    return found


class Work(TorchDispatchMode):
    """Sees the operators that another pack's function runs, to tell whether it computes attention.

    Kernels that are called past torch's dispatcher still allocate their output through it.
    """

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled functions stay compiled inside."""
        return True

    def __init__(self) -> None:
        super().__init__()
        self._product = False
        """A product of two activations, as attention makes, or a package's kernel; not only projections."""
        self._unfilled: dict[int, StorageWeakRef] = {}
        """Allocated memory that no operator of torch has filled: possibly a kernel's output."""
        self.attention = False
        """Certainly attention, and not ours: a function for it, or weights by softmax and then a product with them."""
        self._weights = False
        self.left = False
        """The model's own block was called."""

    @property
    def likely(self) -> bool:
        """Whether attention may have been computed."""
        return self._product or bool(self._unfilled)

    def __enter__(self) -> Work:
        _works().append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _works().pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kind = _kinds.get(func)
        if kind is None:
            kind = _kinds[func] = _kind(func)
        if kind >= KERNEL:
            self._product = True
            if kind >= PRODUCT and not self.attention and _works()[-1] is self and not _is_ours(sys._getframe(1)):
                self.attention = kind == ATTENTION or (kind == PRODUCT and self._weights)
                self._weights = self._weights or kind == SOFTMAX
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if kind == MEMORY:
            if isinstance(output, torch.Tensor) and output.numel():
                storage = StorageWeakRef(output.untyped_storage())
                self._unfilled[storage.cdata] = storage
        elif self._unfilled and func in _filling:
            for filled in (*args[:1], *kwargs.values()):
                if isinstance(filled, torch.Tensor):
                    self._unfilled.pop(StorageWeakRef(filled.untyped_storage()).cdata, None)
        return output

    def without(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, run outside this watch: it is the model's own."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.left = True
            self.__exit__(None, None, None)
            try:
                return function(*args, **kwargs)
            finally:
                self.__enter__()

        run.__dict__["__wrapped__"] = function
        return run


NOTHING, MEMORY, KERNEL, PRODUCT, SOFTMAX, ATTENTION = range(6)
_kinds: dict[Any, int] = {}
_filling: set[Any] = set()
"""Operators that write into memory that they are given, of those in `_kinds`."""
_FILLING = ("copy_", "fill_", "zero_")
_NO_ATTENTION = frozenset({"mm", "gemm", "linear", "quantize", "dequantize", "rope", "norm", "layernorm", "rmsnorm"})
"""Words in the names of packages' operators for weights of few bits, positions and norms."""


def _kind(func: Any) -> int:
    """What kind of work an operator shows."""
    namespace, _, name = (func.name() if hasattr(func, "name") else str(func)).rpartition("::")
    base, _, overload = name.partition(".")
    if base in _FILLING or overload.endswith("out"):
        _filling.add(func)
    if any(word in name for word in ("scaled_dot_product", "attention", "attn")):
        return ATTENTION
    if "softmax" in name:
        return SOFTMAX
    if any(word in name for word in ("bmm", "matmul", "einsum")):
        return PRODUCT
    if name.startswith(("empty", "new_empty")):
        return MEMORY
    if namespace not in ("aten", "prim", "prims") and not _NO_ATTENTION & set(base.split("_")):
        return KERNEL
    return NOTHING


def _is_ours(frame: Any) -> bool:
    """Whether an operator runs inside a call of our hook."""
    while frame is not None and frame.f_code not in WATCHES:
        if frame.f_code is run_hook_call.__code__:
            return True
        frame = frame.f_back
    return False


WATCHES: set[CodeType] = set()
"""The functions in which a watch begins; frames above them are ignored."""
