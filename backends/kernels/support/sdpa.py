"""torch's scaled_dot_product_attention as a kernel: with torch's dispatch, or pinned to one implementation.

An implementation is called by its own operator. The switches of torch.nn.attention.sdpa_kernel belong to the whole
process: set around a call, they change what other threads' calls run on, and two threads that set and restore them
leave the process on one implementation for good. The operators check less than scaled_dot_product_attention does, so
this file alone calls them, and does before what ATen/native/transformers/attention.cpp does before it calls them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from operator import itemgetter
from typing import TYPE_CHECKING, Any, ClassVar

from ...values.platform import Platform
from ...values.request import AttentionCall
from ..backend import Backend, Kernel, package_reason

if TYPE_CHECKING:
    import torch


def expand_kv(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value with each key head repeated for the query heads that share it."""
    repeats = call.query.shape[1] // call.key.shape[1]
    if repeats == 1:
        return call.key, call.value
    return call.key.repeat_interleave(repeats, dim=1), call.value.repeat_interleave(repeats, dim=1)


def plain_sdpa() -> Kernel:
    """A kernel that is one call of scaled_dot_product_attention, every argument passed on."""
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    def run(call: AttentionCall) -> torch.Tensor:
        return sdpa(
            call.query,
            call.key,
            call.value,
            attn_mask=call.attn_mask,
            is_causal=call.is_causal,
            scale=call.scale,
            enable_gqa=call.enable_gqa,
        )

    return run


def expanded(call: AttentionCall) -> AttentionCall:
    """The same call with key heads repeated, for kernels that do not group query heads."""
    key, value = expand_kv(call)
    return call.changed(key=key, value=value, enable_gqa=False)


def without_gaps(call: AttentionCall) -> AttentionCall:
    """The same call with head_dim contiguous, which all fused kernels of torch require; usually the call itself."""
    if call.query.stride(-1) == 1 and call.key.stride(-1) == 1 and call.value.stride(-1) == 1:
        return call
    return call.changed(query=call.query.contiguous(), key=call.key.contiguous(), value=call.value.contiguous())


CHECKS = {"FLASH_ATTENTION": "flash", "CUDNN_ATTENTION": "cudnn", "EFFICIENT_ATTENTION": "efficient"}
"""The fused implementations of CUDA and ROCm in ComfyUI's order; torch's check of one: can_use_flash_attention."""

SWITCHES = {"FLASH_ATTENTION": "flash_sdp", "CUDNN_ATTENTION": "cudnn_sdp", "EFFICIENT_ATTENTION": "mem_efficient_sdp"}
"""What torch.backends.cuda calls their switches, which are the process's: flash_sdp_enabled."""


def facts_for_torch(call: AttentionCall) -> object:
    """A call as torch's own checks take it."""
    from torch.backends.cuda import SDPAParams

    return SDPAParams(call.query, call.key, call.value, call.attn_mask, 0.0, call.is_causal, call.enable_gqa)


Take = Callable[[Any], Any]
"""What is taken of what an operator returns; a function in C, so that it costs no frame."""
OUTPUT: Take = itemgetter(0)
WITH_LSE: Take = itemgetter(0, 1)
"""Output and log-sum-exp: the natural logarithm, float32 or float64; what an empty row has there is not said."""


def pinned(pin: str, platform: Platform, take: Take = OUTPUT) -> Kernel:
    """A kernel that runs one member of torch.nn.attention.SDPBackend and no other, whatever the process's switches say.

    On CUDA and ROCm torch's own check is asked first. It says no where another thread or pack has switched the
    implementation off, too, which tells nothing about the call: then the declared limits and the operator decide.

    Raises:
        ValueError: in a call: torch's check refuses it.
        As `implementation`.
    """
    kernel = implementation(pin, platform, take)
    if pin not in CHECKS or platform.kind == "cpu":
        return kernel
    from torch.backends import cuda

    can_use = getattr(cuda, f"can_use_{CHECKS[pin]}_attention")
    enabled = getattr(cuda, f"{SWITCHES[pin]}_enabled")

    def run(call: AttentionCall) -> torch.Tensor:
        if call.enable_gqa and pin == "EFFICIENT_ATTENTION":
            call = expanded(call)
        was_on = enabled()
        if not can_use(facts_for_torch(call)) and was_on and enabled() and computes(call):
            raise ValueError(f"torch's {pin} does not take this call")
        return kernel(call)

    return run


def implementation(pin: str, platform: Platform, take: Take = OUTPUT) -> Kernel:
    """The operator of one member of torch.nn.attention.SDPBackend on a kind of device, unchecked but for its shapes.

    Args:
        pin: the member's name: CUDNN_ATTENTION, FLASH_ATTENTION, EFFICIENT_ATTENTION or MATH.

    Raises:
        ValueError: in a call: the shapes of query, key, value and mask disagree, or the operator would compute
            something else.
        RuntimeError: in a call: the operator itself refuses it.
    """
    if pin == "MATH":
        return _math()
    if pin == "FLASH_ATTENTION":
        return _flash_on_cpu(platform, take) if platform.kind == "cpu" else _flash(take)
    return _efficient(take) if pin == "EFFICIENT_ATTENTION" else _cudnn(platform)


def computes(call: AttentionCall) -> bool:
    """Whether a call has anything to compute: False where there is no key, or no element of output.

    Raises:
        ValueError: its shapes or dtypes disagree. The fused operators read memory by the query's shape without looking.
    """
    if call.key.dtype is not call.query.dtype or call.value.dtype is not call.query.dtype:
        raise ValueError(f"dtypes disagree: query {call.query.dtype}, key {call.key.dtype}, value {call.value.dtype}")
    query, key, value = call.query.shape, call.key.shape, call.value.shape
    batch, heads, q_len, head_dim = query
    key_batch, key_heads, kv_len, key_dim = key
    grouped = call.enable_gqa and key_heads and not heads % key_heads
    if (
        key_batch != batch
        or key_dim != head_dim
        or value[:3] != key[:3]
        or (key_heads != heads and not grouped)
        or (call.attn_mask is not None and not _broadcasts(call.attn_mask.shape, (batch, heads, q_len, kv_len)))
    ):
        mask = "" if call.attn_mask is None else f", mask {tuple(call.attn_mask.shape)}"
        raise ValueError(f"shapes disagree: query {tuple(query)}, key {tuple(key)}, value {tuple(value)}{mask}")
    return 0 not in query and kv_len != 0 and value[3] != 0


def _broadcasts(shape: torch.Size, scores: tuple[int, int, int, int]) -> bool:
    if shape == scores:
        return True
    batch, heads, rows, columns = shape
    return (
        (batch == 1 or batch == scores[0])
        and (heads == 1 or heads == scores[1])
        and (rows == 1 or rows == scores[2])
        and (columns == 1 or columns == scores[3])
    )


def nothing(call: AttentionCall) -> torch.Tensor:
    """The output of a call that computes nothing: zeros, as scaled_dot_product_attention gives for no keys."""
    return call.query.new_zeros((*call.query.shape[:3], call.value.shape[3]))


@lru_cache(maxsize=64)
def _ends(dtype: torch.dtype, device: torch.device, hidden: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What True and False of a mask become; kept, as making them takes longer than using them."""
    import torch

    with torch.inference_mode(False):  # they are used outside of it, too
        return torch.zeros((), dtype=dtype, device=device), torch.full((), hidden, dtype=dtype, device=device)


def bias_of(call: AttentionCall, hidden: float = float("-inf")) -> torch.Tensor | None:
    """The mask as the operators take it: added to the scores, in the query's dtype.

    Args:
        hidden: what False becomes.

    Raises:
        ValueError: the mask is neither boolean nor floating; torch's own function refuses it too.
    """
    mask, dtype = call.attn_mask, call.query.dtype
    if mask is None or mask.dtype is dtype:
        return mask
    import torch

    if mask.dtype is torch.bool:
        return torch.where(mask, *_ends(dtype, mask.device, hidden))
    if not mask.is_floating_point():
        raise ValueError(f"mask dtype {mask.dtype} is neither bool nor floating")
    # A finite number that the query's dtype cannot hold stays finite: -inf would hide the key.
    ends = torch.finfo(dtype)
    if torch.finfo(mask.dtype).max <= ends.max:
        return mask.to(dtype)
    return torch.where(mask.isinf(), mask, mask.clamp(ends.min, ends.max)).to(dtype)


def _needs_lse(call: AttentionCall) -> bool:
    """Whether a backward pass may follow, for which a forward pass keeps the log-sum-exp."""
    import torch

    return torch.is_grad_enabled() and (call.query.requires_grad or call.key.requires_grad or call.value.requires_grad)


def _no_gradient_of_mask(call: AttentionCall) -> None:
    if call.attn_mask is not None and call.attn_mask.requires_grad:
        raise ValueError("a mask that requires a gradient has none in the fused kernels")


def _square_if_causal(call: AttentionCall) -> None:
    if call.is_causal and call.query.shape[2] != call.key.shape[2]:
        raise ValueError(f"causal with q_len {call.query.shape[2]} != kv_len {call.key.shape[2]}")


def _math() -> Kernel:
    """Takes every shape that broadcasts, zero lengths too."""
    from torch import _scaled_dot_product_attention_math as operator

    def run(call: AttentionCall) -> torch.Tensor:
        output: torch.Tensor = operator(
            call.query,
            call.key,
            call.value,
            bias_of(call),
            0.0,
            call.is_causal,
            scale=call.scale,
            enable_gqa=call.enable_gqa,
        )[0]
        return output

    return run


def _flash_on_cpu(platform: Platform, take: Take) -> Kernel:
    from torch import _scaled_dot_product_flash_attention_for_cpu as operator

    # torch 2.13 groups heads here (sdp_utils_cpp.cpp). An older operator would silently read past the keys, so
    # a nightly build of 2.13, which may be older than that, does not count.
    groups = package_reason("torch>=2.13.0rc1", platform) is None

    def run(call: AttentionCall) -> torch.Tensor:
        if not computes(call):  # the operator divides by these lengths and ends the process
            return nothing(call)
        mask = call.attn_mask
        if mask is not None:
            _no_gradient_of_mask(call)
            mask = bias_of(call)
        if call.enable_gqa and not groups:
            call = expanded(call)
        output: torch.Tensor = take(
            operator(call.query, call.key, call.value, 0.0, call.is_causal, attn_mask=mask, scale=call.scale)
        )
        return output

    return run


def _flash(take: Take) -> Kernel:
    """CUDA and ROCm. Groups heads; head_dim is filled up with zeros to a multiple of 8."""
    from torch import _scaled_dot_product_flash_attention as operator
    from torch.nn.functional import pad

    def run(call: AttentionCall) -> torch.Tensor:
        if call.attn_mask is not None:
            raise ValueError("torch's FlashAttention takes no mask")
        if not computes(call):
            return nothing(call)
        _square_if_causal(call)  # the operator aligns the triangle with the last key
        query, key, value, scale = call.query, call.key, call.value, call.scale
        head_dim = query.shape[3]
        if head_dim % 8:
            scale = head_dim**-0.5 if scale is None else scale
            query, key, value = (pad(tensor, (0, -head_dim % 8)) for tensor in (query, key, value))
            wide, *others = operator(query, key, value, 0.0, call.is_causal, False, scale=scale)
            output: torch.Tensor = take((wide[..., :head_dim], *others))
        else:
            output = take(operator(query, key, value, 0.0, call.is_causal, False, scale=scale))
        return output

    return run


def _efficient(take: Take) -> Kernel:
    """CUDA and ROCm. Has no grouped form: key heads are repeated."""
    from torch import _scaled_dot_product_efficient_attention as operator

    def run(call: AttentionCall) -> torch.Tensor:
        if not computes(call):
            return nothing(call)
        _no_gradient_of_mask(call)
        bias = bias_of(call)
        if bias is not None:
            bias = aligned(bias, call)
        if call.enable_gqa:
            call = expanded(call)
        lse = take is not OUTPUT or _needs_lse(call)
        output: torch.Tensor = take(
            operator(call.query, call.key, call.value, bias, lse, 0.0, call.is_causal, scale=call.scale)
        )
        return output

    return run


def aligned(bias: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """A bias of the scores' whole shape, whose rows begin at multiples of 16 elements, as CUTLASS reads them."""
    kv_len = call.key.shape[2]
    bias = bias.expand(*call.query.shape[:3], kv_len)
    if kv_len % 16:
        from torch.nn.functional import pad

        return pad(bias, (0, -kv_len % 16))[..., :kv_len]
    *strides, last = bias.stride()
    return bias.contiguous() if last != 1 or any(stride % 16 for stride in strides) else bias


def _cudnn(platform: Platform) -> Kernel:
    """CUDA. Groups heads."""
    from torch import _scaled_dot_product_cudnn_attention as operator

    # As torch itself: before 2.12 -65504 worked round a defect of -inf in cuDNN (pytorch pull request 177868).
    hidden = -65504.0 if package_reason("torch>=2.12.0rc1", platform) else float("-inf")

    def run(call: AttentionCall) -> torch.Tensor:
        if not computes(call):
            return nothing(call)
        _square_if_causal(call)
        _no_gradient_of_mask(call)
        bias = bias_of(call, hidden)
        output: torch.Tensor = operator(
            call.query,
            call.key,
            call.value,
            bias,
            _needs_lse(call),
            0.0,
            call.is_causal,
            False,
            scale=call.scale,
        )[0]
        return output

    return run


class PinnedSDPA(Backend):
    """One member of torch.nn.attention.SDPBackend, called by its own operator.

    Never a priority list: with a list and a mask, torch has been seen to fall to its slowest implementation although
    the first one listed runs alone (https://github.com/pytorch/pytorch/pull/114689 introduced the context).
    """

    pin: ClassVar[str]

    def load(self, platform: Platform) -> Kernel:
        kernel = pinned(self.pin, platform)
        return lambda call: kernel(without_gaps(call))
