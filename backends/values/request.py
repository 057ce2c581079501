"""`AttentionRequest`: the facts of an attention call; `AttentionCall`: its tensors.

Selection uses only the request, which is hashable and needs no torch: it is the cache key, the text in errors, and the
input of `explain` and of tests.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

from .bounded import shortened
from .grid import TokenGrid, parse_grid

if TYPE_CHECKING:
    import torch

    from .mask_plan import MaskPlan

MASK_KINDS = ("none", "key_padding", "bool", "bias")
"""`none`; `key_padding`: boolean, the same for every head and query; `bool`: boolean; `bias`: added to scores."""

MOST_SIZE = 2**48
"""Upper bound for batches and lengths from files and command lines."""

DTYPES = ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2")


class AttentionRequest(NamedTuple):
    """Facts of one call. Query is (batch, num_heads, q_len, head_dim); key and value have num_kv_heads, kv_len."""

    batch: int
    num_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    dtype: str
    num_kv_heads: int = 0
    """0: `num_heads`, no grouping of query heads."""
    v_head_dim: int = 0
    """0: `head_dim`."""
    mask: str = "none"
    """One of `MASK_KINDS`, by dtype, shape and strides of the mask."""
    is_causal: bool = False
    scale: float | None = None
    """Factor of the scores; None: head_dim ** -0.5."""
    exact_only: bool = False
    """The model forbids reduced precision for this call (`low_precision_attention=False`)."""
    lse: bool = False
    """The log-sum-exp of each row is requested with the output."""
    grid: TokenGrid | None = None
    """How the tokens lie in frames, height and width; None: unknown."""

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a key head (GQA, MQA)."""
        return self.num_kv_heads not in (0, self.num_heads)

    def describe(self) -> str:
        """The facts in one line, for errors and logs."""
        kv_heads = self.num_kv_heads or self.num_heads
        parts = [
            f"batch {self.batch}",
            f"{self.num_heads} heads" + (f" over {kv_heads} key heads" if self.grouped else ""),
            f"q_len {self.q_len}",
            f"kv_len {self.kv_len}",
            f"head_dim {self.head_dim}"
            + (f" (value {self.v_head_dim})" if self.v_head_dim not in (0, self.head_dim) else ""),
            self.dtype,
            f"mask {self.mask}",
        ]
        if self.is_causal:
            parts.append("causal")
        if self.scale is not None:
            parts.append(f"scale {self.scale:g}")
        if self.exact_only:
            parts.append("low precision forbidden by the model")
        if self.lse:
            parts.append("with its log-sum-exp")
        if self.grid is not None:
            parts.append(f"grid {self.grid.describe()}")
        return ", ".join(parts)


def parse_request(text: str) -> AttentionRequest:
    """Parse a request from `name=value` pairs, e.g. `batch=1,num_heads=24,q_len=4096,head_dim=128`.

    `kv_len` defaults to `q_len`, `batch` to 1 and `dtype` to bfloat16.

    Raises:
        ValueError: an unknown name, an invalid value, or a missing size; the message says which.
    """
    values: dict[str, object] = {"batch": 1, "dtype": "bfloat16"}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        name, equals, raw = (part.strip() for part in pair.partition("="))
        if not equals or name not in AttentionRequest._fields:
            raise ValueError(
                f"request: {shortened(pair, 80)!r} is not one of {', '.join(AttentionRequest._fields)}, as name=value"
            )
        values[name] = _parse_value(name, raw)
    values.setdefault("kv_len", values.get("q_len"))
    missing = [name for name in ("num_heads", "q_len", "head_dim") if values.get(name) is None]
    if missing:
        raise ValueError(f"request: {', '.join(missing)} not given")
    request = AttentionRequest(**values)  # type: ignore[arg-type]  # each value was read by its field's kind
    if request.grouped and request.num_heads % request.num_kv_heads:
        raise ValueError(
            f"request: num_heads {request.num_heads} is not a multiple of num_kv_heads {request.num_kv_heads}"
        )
    return request


def _scale(raw: str) -> float | None:
    scale = None if raw.lower() == "none" else float(raw)
    if scale is not None and not isfinite(scale):
        raise ValueError("nan and inf")
    return scale


def _parse_value(name: str, raw: str) -> object:
    if name == "dtype":
        short = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "fp64": "float64"}
        dtype = short.get(raw, raw)
        if dtype not in DTYPES:
            raise ValueError(f"request: dtype {raw!r} is not one of {', '.join(DTYPES)}")
        return dtype
    if name == "mask":
        if raw not in MASK_KINDS:
            raise ValueError(f"request: mask {raw!r} is not one of {', '.join(MASK_KINDS)}")
        return raw
    if name == "grid":
        return parse_grid(raw)
    if name in ("is_causal", "exact_only", "lse"):
        if raw.lower() not in ("true", "false", "1", "0"):
            raise ValueError(f"request: {name} {raw!r} is neither true nor false")
        return raw.lower() in ("true", "1")
    try:
        if name == "scale":
            return _scale(raw)
        number = int(raw)
    except ValueError as error:
        raise ValueError(f"request: {name} {shortened(raw, 80)!r} is not a number") from error
    if number >= MOST_SIZE:
        raise ValueError(f"request: {name} {shortened(raw, 80)} >= {MOST_SIZE}")
    if number < (0 if name in ("num_kv_heads", "v_head_dim") else 1):
        raise ValueError(f"request: {name} {number} < 1")
    return number


_SAME: Any = object()
"""Default of the arguments of `AttentionCall.changed`."""


class AttentionCall:
    """The tensors of one call, in BHSD layout: the argument of a kernel.

    `query` is (batch, num_heads, q_len, head_dim), `key` and `value` (batch, num_kv_heads, kv_len, ...);
    `attn_mask` is None or four-dimensional and broadcastable to (batch, num_heads, q_len, kv_len).
    `memo`: cache of kernels for values derived from the mask, such as packed bits; None if the mask's lifetime is
    unknown.
    `owned`: the caller does not read query, key and value again; a kernel may set them to None to free their memory.
    """

    __slots__ = ("attn_mask", "enable_gqa", "is_causal", "key", "memo", "owned", "query", "scale", "value")

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        *,
        memo: dict[object, object] | None = None,
        owned: bool = False,
    ) -> None:
        self.query = query
        self.key = key
        self.value = value
        self.attn_mask = attn_mask
        self.is_causal = is_causal
        self.scale = scale
        self.enable_gqa = enable_gqa
        self.memo = memo
        self.owned = owned

    def changed(
        self,
        *,
        query: Any = _SAME,
        key: Any = _SAME,
        value: Any = _SAME,
        attn_mask: Any = _SAME,
        is_causal: Any = _SAME,
        scale: Any = _SAME,
        enable_gqa: Any = _SAME,
        memo: Any = _SAME,
        owned: Any = _SAME,
    ) -> AttentionCall:
        """A copy with some attributes replaced; a new mask drops `memo` unless a new one is given.

        Every derived call is made here, so that no attribute gets lost. Written out because each masked call runs it: a
        loop over the names takes ten times as long.
        """
        made = AttentionCall.__new__(AttentionCall)
        made.query = self.query if query is _SAME else query
        made.key = self.key if key is _SAME else key
        made.value = self.value if value is _SAME else value
        made.attn_mask = self.attn_mask if attn_mask is _SAME else attn_mask
        made.is_causal = self.is_causal if is_causal is _SAME else is_causal
        made.scale = self.scale if scale is _SAME else scale
        made.enable_gqa = self.enable_gqa if enable_gqa is _SAME else enable_gqa
        made.owned = self.owned if owned is _SAME else owned
        if attn_mask is not _SAME and memo is _SAME:
            memo = None
        made.memo = self.memo if memo is _SAME else memo
        return made

    def request(
        self, *, exact_only: bool = False, lse: bool = False, grid: TokenGrid | None = None
    ) -> AttentionRequest:
        """The facts of this call, by shapes and dtypes, without synchronisation."""
        from .masks import mask_kind

        batch, num_heads, q_len, head_dim = self.query.shape
        return AttentionRequest(
            batch=batch,
            num_heads=num_heads,
            q_len=q_len,
            kv_len=self.key.shape[2],
            head_dim=head_dim,
            dtype=str(self.query.dtype).removeprefix("torch."),
            num_kv_heads=self.key.shape[1],
            v_head_dim=self.value.shape[3],
            mask="none" if self.attn_mask is None else mask_kind(self.attn_mask),
            is_causal=self.is_causal,
            scale=self.scale,
            exact_only=exact_only,
            lse=lse,
            grid=grid,
        )


class LseCall(AttentionCall):
    """A call whose plan, with `AttentionRequest.lse`, stores the log-sum-exp in `lse`.

    `lse`: (batch, num_heads, q_len), float32, natural logarithm. `changed` returns a plain `AttentionCall`.
    """

    __slots__ = ("lse",)

    lse: torch.Tensor


Host = Callable[..., "torch.Tensor"]
"""Computes a call with the host program's own attention function: `host(*arguments, call)`; returns BHSD.

The arguments are kept apart because `functools.partial` takes 0.1 us more, in each call.
"""


class HostedCall(AttentionCall):
    """A call with the host's own function, for the backend `comfy`."""

    __slots__ = ("arguments", "host")

    def __init__(self, call: AttentionCall, host: Host, arguments: tuple[Any, ...] = ()) -> None:
        # Without `super().__init__`: each call of ComfyUI's own function makes one, and that would take 0.5 us.
        self.query, self.key, self.value, self.attn_mask = call.query, call.key, call.value, call.attn_mask
        self.is_causal, self.scale, self.enable_gqa = call.is_causal, call.scale, call.enable_gqa
        self.memo, self.owned = call.memo, call.owned
        self.host, self.arguments = host, arguments


def hosted(call: AttentionCall, host: Host | None, arguments: tuple[Any, ...] = ()) -> AttentionCall:
    """The call with its host's function; unchanged without a host."""
    return call if host is None or isinstance(call, HostedCall) else HostedCall(call, host, arguments)


class SplitCall(AttentionCall):
    """A masked call with its mask plan, for a varlen kernel that runs all sub-calls at once."""

    __slots__ = ("mask_plan",)

    def __init__(self, call: AttentionCall, mask_plan: MaskPlan) -> None:
        super().__init__(
            call.query, call.key, call.value, call.attn_mask, call.is_causal, call.scale, call.enable_gqa,
            memo=call.memo, owned=call.owned,
        )  # fmt: skip
        self.mask_plan = mask_plan
