"""Times and checks every backend on plain tensors: the same query, key and value, against float64.

Protocol: inputs from a fixed seed, warm-up calls, then the median of timed calls with the device synchronised around
each. Accuracy is relative L2 and cosine against the `reference` backend. A backend that cannot run is a row that
says why; nothing falls back.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

from .names import COMFY
from .platform import detect
from .request import AttentionCall, AttentionRequest
from .router import Router

if TYPE_CHECKING:
    import torch

WARM_UP, TIMED = 3, 10


@dataclass(frozen=True)
class KernelResult:
    """One backend on one problem. Times in milliseconds; figures are None where it did not run."""

    backend: str
    status: str
    """`ok`, or why it did not run."""
    ms: float | None = None
    relative_l2: float | None = None
    cosine: float | None = None

    def as_dict(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)


def run_kernels(request: AttentionRequest, device: str = "", seed: int = 0) -> list[KernelResult]:
    """Run every backend on one problem of the facts in `request` (masks hide the last quarter of the keys).

    `device` is a torch device name; default: the machine's accelerator, else the CPU.
    """
    import torch

    platform = detect(torch.device(device) if device else None)
    router = Router(platform)
    target = torch.device(device or ("cuda" if platform.kind == "rocm" else platform.kind))
    results = []
    with torch.inference_mode():
        call = random_call(request, target, seed)
        exact = router.kernel("reference")(call).double()
        for backend_id in router.backends:
            if backend_id == COMFY:
                continue
            reasons = router.refuse(backend_id, request)
            if reasons:
                results.append(KernelResult(backend_id, "; ".join(reasons)))
            else:
                results.append(_measure(backend_id, router, call, exact, target))
    return results


def random_call(request: AttentionRequest, device: torch.device, seed: int) -> AttentionCall:
    """Normal random tensors of the request's shapes and dtype; a mask hides the last quarter of the keys."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, request.dtype)

    def rand(heads: int, length: int, size: int) -> torch.Tensor:
        return torch.randn(request.batch, heads, length, size, generator=generator).to(device, dtype)

    kv_heads = request.num_kv_heads or request.num_heads
    mask = None
    if request.mask != "none":
        visible = torch.arange(request.kv_len, device=device) < request.kv_len - request.kv_len // 4
        shape = (request.batch, 1, 1 if request.mask == "key_padding" else request.q_len, request.kv_len)
        mask = visible.expand(shape)
        if request.mask == "bool":
            mask = mask.contiguous()
        elif request.mask == "bias":
            mask = torch.zeros(shape, device=device, dtype=dtype).masked_fill(~mask, float("-inf"))
    return AttentionCall(
        rand(request.num_heads, request.q_len, request.head_dim),
        rand(kv_heads, request.kv_len, request.head_dim),
        rand(kv_heads, request.kv_len, request.v_head_dim or request.head_dim),
        mask,
        request.is_causal,
        request.scale,
        request.grouped,
    )


def _measure(
    backend_id: str, router: Router, call: AttentionCall, exact: torch.Tensor, device: torch.device
) -> KernelResult:
    import torch

    kernel = router.kernel(backend_id)
    try:
        for _ in range(WARM_UP):
            output = kernel(call)
        times = []
        for _ in range(TIMED):
            synchronise(device)
            start = perf_counter()
            output = kernel(call)
            synchronise(device)
            times.append((perf_counter() - start) * 1e3)
    except Exception as error:  # one kernel that fails is a row; the others still run
        return KernelResult(backend_id, f"failed: {type(error).__name__}: {error}")
    output = output.double()
    difference = (output - exact).norm() / exact.norm()
    cosine = torch.nn.functional.cosine_similarity(output.flatten(), exact.flatten(), dim=0)
    return KernelResult(backend_id, "ok", round(median(times), 3), float(difference), float(cosine))


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type in ("xpu", "mps"):
        getattr(torch, device.type).synchronize()


def compare_kernels() -> str:
    """A table of every backend that runs here, on a small problem, for people who have no ComfyUI yet."""
    request = AttentionRequest(batch=1, num_heads=8, q_len=1024, kv_len=1024, head_dim=64, dtype="float32")
    results = run_kernels(request)
    lines = [f"call: {request.describe()}", f"{'backend':18} {'ms':>9} {'relative L2':>12}"]
    lines += [f"{row.backend:18} {row.ms:9.2f} {row.relative_l2:12.1e}" for row in results if row.ms is not None]
    refused = sum(row.ms is None for row in results)
    lines.append(f"median of {TIMED} calls; relative L2 against float64; {refused} more backends cannot run here")
    return "\n".join(lines)
