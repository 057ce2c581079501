"""What attention takes in memory: our path against PyTorch's own call, and what containers and declarations are worth.

Bytes are counted by torch's profiler, which sees every allocation of the CPU's allocator, also inside a kernel. A peak
is the most that was allocated at once since the function began; what existed before it does not count.

Run: python benchmarks/memory.py   (no ComfyUI needed; a few seconds)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).resolve().parent)]

import conftest  # noqa: E402, F401  # loads this folder as the package attention_backends
import torch  # noqa: E402
from paired import machine, training_paused  # noqa: E402

HEADS, HEAD_DIM = 8, 64
TOKENS = 2048


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most bytes on the CPU at once while `function` runs, its result included; it runs once before."""
    from torch.profiler import ProfilerActivity, profile

    function()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = function()
    del output
    events = profiler.profiler.kineto_results.events()
    now = most = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def figure(count: int) -> dict[str, int]:
    """A count as a figure of the suite: without an interval, since it is the same each time."""
    return {"median": count, "low": count, "high": count}


def masks(tokens: int) -> dict[str, torch.Tensor | None]:
    """The forms whose way through our path differs in what it copies."""
    suffix, gap = torch.zeros(1, 1, 1, tokens), torch.zeros(1, 1, 1, tokens)
    suffix[..., tokens // 2 :] = float("-inf")
    gap[..., 32 : 32 + tokens // 2] = float("-inf")
    return {"no mask": None, "suffix of 50 %": suffix, "gap of 50 %": gap}


def calls(tokens: int = TOKENS) -> dict[str, Any]:
    """One hook call of each form, batch 1, float32: PyTorch's attention as ComfyUI calls it, and ours."""
    from attention_backends.backends.config import AttentionConfig, AttentionSpec
    from hook_side import host, sampling

    override = host.Override((AttentionConfig(default=AttentionSpec("torch_sdpa")),))
    options = {sampling.KEY: override, sampling.OVERRIDE: override}
    query, key, value = (torch.randn(1, tokens, HEADS * HEAD_DIM) for _ in range(3))

    def stock(query: Any, key: Any, value: Any, heads: int, mask: Any = None, **_: Any) -> torch.Tensor:
        query, key, value = (t.view(1, -1, heads, HEAD_DIM).transpose(1, 2) for t in (query, key, value))
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return output.transpose(1, 2).reshape(1, -1, heads * HEAD_DIM)

    found = {}
    for name, mask in masks(tokens).items():
        ours = peak_bytes(lambda mask=mask: override(stock, query, key, value, HEADS, mask=mask,
                                                     transformer_options=options))  # fmt: skip
        found[f"{name}, {tokens} tokens"] = {
            "stock_bytes": peak_bytes(lambda mask=mask: stock(query, key, value, HEADS, mask=mask)),
            "ours_bytes": figure(ours),
        }
    return found


class Container:
    """As ComfyUI's AttentionTensorContainer (0.33): the taker has the only reference to the tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor: torch.Tensor | None = tensor

    def peek(self) -> torch.Tensor | None:
        return self.tensor

    def take(self) -> torch.Tensor | None:
        tensor, self.tensor = self.tensor, None
        return tensor


def letting_go(call: Any) -> torch.Tensor:
    """Like an INT8 kernel: copies in 8 bits, then it needs query, key and value no more."""
    shape = call.query.shape
    rounded = [tensor.to(torch.int8) for tensor in (call.query, call.key, call.value)]
    if call.owned:
        call.query = call.key = call.value = None
    output = torch.zeros(shape)
    del rounded
    return output


def owned(tokens: int = TOKENS) -> dict[str, Any]:
    """Calls whose tensors are ours alone, with a kernel that can let go of them, against the same without."""
    from attention_backends.backends.config import AttentionConfig, AttentionSpec
    from attention_backends.backends.kernels import BACKENDS
    from hook_side import Kernel, compiled, host, model_call, sampling, stand_in

    override = host.Override((AttentionConfig(default=AttentionSpec("sdpa_math")),))
    run = sampling.Run(override)
    options = {sampling.KEY: override, sampling.OVERRIDE: override, sampling.RUN_KEY: run}
    model = stand_in(["WanModel"], {})
    router = sampling.router_for(torch.device("cpu"))
    before = router.backends, dict(router._unavailable), dict(router._kernels), compiled.comfys_attention

    def call(hand_over: bool, mask: torch.Tensor | None) -> torch.Tensor:
        tensors = [torch.zeros(1, tokens, HEADS * HEAD_DIM) for _ in range(3)]
        if not hand_over:
            return override(letting_go, *tensors, HEADS, mask=mask, transformer_options=options)
        containers = [Container(tensors.pop(0)) for _ in range(3)]
        return override.container_function(*containers, HEADS, mask=mask, transformer_options=options)

    def peak(hand_over: bool, mask: torch.Tensor | None) -> int:
        return peak_bytes(lambda: model_call(model, options, lambda: call(hand_over, mask)))

    try:
        router.backends = {**BACKENDS, "sdpa_math": Kernel("sdpa_math", letting_go)}
        router._unavailable["sdpa_math"], router._kernels["sdpa_math", ()] = (), letting_go
        compiled.comfys_attention = lambda: letting_go  # there is no ComfyUI here to ask for it
        return {
            name: {"kept_bytes": peak(False, mask), "owned_bytes": figure(peak(True, mask))}
            for name, mask in masks(tokens).items()
        }
    finally:
        router.backends, router._unavailable, router._kernels, compiled.comfys_attention = before
        run.close()


def declared(tokens: int = 512) -> dict[str, Any]:
    """What kernels that run here take beside their tensors, and what they say."""
    from attention_backends.backends.kernels import BACKENDS
    from attention_backends.backends.kernels.registry import detect
    from attention_backends.backends.values.request import AttentionCall

    platform = detect(torch.device("cpu"))
    call = AttentionCall(*(torch.randn(1, HEADS, tokens, HEAD_DIM) for _ in range(3)))
    found = {}
    for name in ("torch_sdpa", "sdpa_math", "reference", "emulated_int8"):
        kernel = BACKENDS[name].load(platform)
        taken = peak_bytes(lambda kernel=kernel: kernel(call)) - call.query.nbytes
        said = BACKENDS[name].workspace_bytes(call.request(), platform)
        found[name] = {"measured_bytes": figure(taken), "declared_bytes": said}
    return found


def measure(tokens: int = TOKENS) -> dict[str, Any]:
    """Everything, on one thread: each thread of a kernel has its own scratch memory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            return {"calls": calls(tokens), "declared": declared(), "owned": owned(tokens)}
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    with training_paused():
        print(json.dumps({"machine": machine(), "torch": torch.__version__, **measure()}, indent=2))
