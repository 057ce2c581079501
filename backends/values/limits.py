"""The requests that a kernel accepts, as data: the source of its reasons and of the support table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isclose

from .request import AttentionRequest

HALF = ("float16", "bfloat16")
FLOATING = ("float16", "bfloat16", "float32", "float64")
ANY_MASK = ("none", "key_padding", "bool", "bias")


@dataclass(frozen=True)
class Limits:
    """What one kernel takes. Each field refuses with the value and the limit."""

    dtypes: tuple[str, ...] = HALF
    min_head_dim: int = 1
    max_head_dim: int | None = None
    head_dims: tuple[int, ...] | None = None
    """The only head sizes there are; None for any up to `max_head_dim`."""
    head_dim_multiple: int = 1
    head_dim_steps: tuple[tuple[str, int], ...] = ()
    """A dtype and the multiple that head sizes must be in it, where that differs between dtypes."""
    wide_head_dim_multiple: int = 1
    """Head sizes above this must be multiples of it."""
    masks: tuple[str, ...] = ANY_MASK
    gqa: bool = True
    causal: bool = True
    causal_cross: bool = False
    """Accepts is_causal with q_len != kv_len, aligned top-left as SDPA defines it."""
    mask_and_causal: bool = False
    scale: bool = True
    """Takes a scale; without it only head_dim ** -0.5, which every kernel computes by itself."""
    mixed_head_dims: bool = False
    """Accepts values whose head size differs from the keys'."""
    min_kv_len: int = 1
    max_kv_len: int | None = None
    kv_block: int = 1
    """kv_len must be a multiple of this: the kernel counts what fills its last block."""
    kv_block_causal: bool = False
    """`kv_block` holds with is_causal too; else a causal call never sees what fills the block."""
    long_kv_block: int = 1
    """A kv_len above this must be a multiple of it."""
    max_elements: int | None = None
    """Most elements of query, key or value, head_dim padded to `padded_head_dims`: a kernel that counts in 32 bits."""
    padded_head_dims: tuple[int, ...] = ()
    max_mask_elements: int | None = None
    """Most elements, q_len * kv_len, of a mask with a row for each query."""
    correction_block: int = 0
    """A matrix of num_heads x blocks of so many queries x keys padded to a block is held; it ends at 2**31 - 1."""
    max_batch: int | None = None
    max_masked_batch: int | None = None
    max_heads: int | None = None
    max_heads_of_all: int | None = None
    """Most heads of all samples together, batch * num_heads."""

    def reasons(self, request: AttentionRequest) -> list[str]:
        """Why `request` is outside these limits; empty when it is inside."""
        checks = (*self._types(request), *self._arguments(request), *self._sizes(request))
        return [reason for refused, reason in checks if refused]

    def _types(self, request: AttentionRequest) -> Iterator[tuple[bool, str]]:
        """The dtype, and what the head sizes may be."""
        head_dim, v_head_dim = request.head_dim, request.v_head_dim or request.head_dim
        sizes = tuple(dict.fromkeys((head_dim, v_head_dim)))
        wide, step = self.wide_head_dim_multiple, dict(self.head_dim_steps).get(request.dtype, 1)
        yield request.dtype not in self.dtypes, f"dtype {request.dtype} not in ({', '.join(self.dtypes)})"
        yield (
            self.head_dims is not None and head_dim not in self.head_dims,
            f"head_dim {head_dim} not in {self.head_dims}",
        )
        yield (
            self.max_head_dim is not None and max(sizes) > self.max_head_dim,
            f"head_dim {max(sizes)} > {self.max_head_dim}",
        )
        yield min(sizes) < self.min_head_dim, f"head_dim {min(sizes)} < {self.min_head_dim}"
        yield (
            any(size % self.head_dim_multiple for size in sizes),
            f"head_dim {head_dim} is not a multiple of {self.head_dim_multiple}",
        )
        for size in sizes:
            yield size % step != 0, f"head_dim {size} is not a multiple of {step} for {request.dtype}"
            yield size > wide and size % wide != 0, f"head_dim {size} > {wide} is not a multiple of {wide}"
        yield (
            head_dim != v_head_dim and not self.mixed_head_dims,
            f"head_dim of values {v_head_dim} != {head_dim}",
        )

    def _arguments(self, request: AttentionRequest) -> Iterator[tuple[bool, str]]:
        """Mask, grouping, causality and scale."""
        yield request.mask not in self.masks, f"mask kind {request.mask} not in ({', '.join(self.masks)})"
        yield (
            request.grouped and not self.gqa,
            f"grouped query heads {request.num_heads}/{request.num_kv_heads} are not supported",
        )
        yield request.is_causal and not self.causal, "is_causal is not supported"
        yield (
            request.is_causal and self.causal and not self.causal_cross and request.q_len != request.kv_len,
            f"is_causal with q_len {request.q_len} != kv_len {request.kv_len}",
        )
        yield (
            request.is_causal and request.mask != "none" and not self.mask_and_causal,
            "is_causal together with a mask",
        )
        yield not self.scale and not _default_scale(request), f"scale {request.scale} is not head_dim ** -0.5"

    def _sizes(self, request: AttentionRequest) -> Iterator[tuple[bool, str]]:
        """Lengths, and how much there is of everything."""
        kv_len, masked = request.kv_len, request.mask != "none"
        yield kv_len < self.min_kv_len, f"kv_len {kv_len} < {self.min_kv_len}"
        yield self.max_kv_len is not None and kv_len > self.max_kv_len, f"kv_len {kv_len} > {self.max_kv_len}"
        yield (
            kv_len % self.kv_block != 0 and (self.kv_block_causal or not request.is_causal),
            f"kv_len {kv_len} is not a multiple of {self.kv_block}",
        )
        long = self.long_kv_block
        yield kv_len > long and kv_len % long != 0, f"kv_len {kv_len} > {long} is not a multiple of {long}"
        elements = self.elements(request)
        yield (
            self.max_elements is not None and elements > self.max_elements,
            f"{elements} elements in one tensor > {self.max_elements}",
        )
        area = request.q_len * kv_len
        yield (
            self.max_mask_elements is not None and request.mask in ("bool", "bias") and area > self.max_mask_elements,
            f"{area} elements in the mask of one head > {self.max_mask_elements}",
        )
        correction = self._correction(request)
        yield correction > 2**31 - 1, f"{correction} elements in the correction of one sample > {2**31 - 1}"
        for value, most, words in (
            (request.batch, self.max_batch, "batch {} > {}"),
            (request.batch if masked else 0, self.max_masked_batch, "batch {} > {} with a mask"),
            (request.num_heads, self.max_heads, "num_heads {} > {}"),
            (request.batch * request.num_heads, self.max_heads_of_all, "{} heads in all samples > {}"),
        ):
            yield most is not None and value > most, words.format(value, most)

    def elements(self, request: AttentionRequest) -> int:
        """Elements of the largest of query, key and value, as the kernel sees them."""
        largest = max(request.head_dim, request.v_head_dim)
        head_dim = next((size for size in sorted(self.padded_head_dims) if size >= largest), largest)
        rows = max(request.num_heads * request.q_len, (request.num_kv_heads or request.num_heads) * request.kv_len)
        return request.batch * rows * head_dim

    def _correction(self, request: AttentionRequest) -> int:
        block = self.correction_block
        if not block:
            return 0
        return request.num_heads * -(-request.q_len // block) * -(-request.kv_len // block) * block


def _default_scale(request: AttentionRequest) -> bool:
    return request.scale is None or isclose(request.scale, request.head_dim**-0.5, rel_tol=1e-6)
