"""What ranks of a group compute in tests; each function is called on every rank with the ranks of the group."""

from __future__ import annotations

import gc
import select
import threading
from random import Random
from typing import Any, NamedTuple

import torch
from attention_backends.backends import account, attention, attention_backend
from attention_backends.backends.engine.routers import router_for
from attention_backends.backends.parallel import strategy
from attention_backends.backends.parallel.rank_group import rank_group
from attention_backends.backends.values.request import AttentionCall
from tolerance import Error, allowed, error, truth
from torch import distributed

DTYPES = ("float16", "bfloat16", "float32", "float64")
MASKS = ("none", "none", "keys", "own keys", "rows", "head rows", "bias", "head bias", "own bias", "empty rank", "all")
BACKENDS = (None, None, None, "sdpa_math", "sdpa_flash", "reference")
torch.set_num_threads(1)
torch.set_grad_enabled(False)


GROUPS: dict[tuple[int, ...], Any] = {}
"""Of the ranks 0 to n, for each n; all of them in every rank."""


def make_groups(size: int) -> None:
    """Called on all ranks at once."""
    for most in range(1, size + 1):
        ranks = tuple(range(most))
        GROUPS[ranks] = distributed.new_group(ranks, backend="gloo")


class Case(NamedTuple):
    """One call over all ranks."""

    seed: int
    parallel: str
    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    q_lens: tuple[int, ...]
    """Of each rank, without replicated tokens."""
    kv_lens: tuple[int, ...]
    before: int = 0
    after: int = 0
    order: str = "contiguous"
    dtype: str = "float32"
    mask: str = "none"
    is_causal: bool = False
    scale: float | None = None
    layout: str = "BHSD"
    lse: bool = False
    backend: str | None = None


def random_case(seed: int, size: int, parallel: str) -> Case:
    """A case for a number of ranks, the same on each of them."""
    random = Random(f"{seed} {size} {parallel}")
    kv_heads = random.choice([1, 1, 2, 3, 4, 5])
    heads = kv_heads * random.choice([1, 1, 2, 3])
    most = random.choice([3, 9, 24])
    q_lens = tuple(random.choice([0, 1, most, random.randint(1, most), random.randint(1, most)]) for _ in range(size))
    is_self = random.random() < 0.7
    kv_lens = q_lens if is_self else tuple(random.randint(0, most) for _ in range(size))
    before, after = (random.choice([0, 0, 3]), random.choice([0, 0, 0, 2])) if is_self else (0, 0)
    if before + after + sum(kv_lens) == 0 or before + after + sum(q_lens) == 0:
        q_lens = kv_lens = (3,) * size
    mask = random.choice(MASKS)
    is_causal = is_self and mask == "none" and random.random() < 0.4
    head_dim = random.choice([8, 16, 40])
    return Case(
        seed, parallel, random.choice([1, 2]), heads, kv_heads, head_dim, random.choice([head_dim, head_dim, 24]),
        q_lens, kv_lens, before, after, random.choice(["contiguous", "contiguous", "balanced"]),
        random.choice(DTYPES), mask, is_causal, random.choice([None, None, 0.3]), random.choice(["BHSD", "BSHD"]),
        random.random() < 0.3, random.choice(BACKENDS),
    )  # fmt: skip


def places(lens: tuple[int, ...], before: int, after: int, order: str, rank: int) -> list[int]:
    """Where the tokens of a rank are in the whole sequence, the replicated ones among them."""
    total = before + sum(lens) + after
    chunks: dict[tuple[int, int], list[int]] = {}
    at, ranks = before, range(len(lens))
    firsts = {r: lens[r] if order == "contiguous" else (lens[r] + 1) // 2 for r in ranks}
    for r, part in [*((r, 0) for r in ranks), *((r, 1) for r in reversed(ranks))]:
        count = lens[r] - firsts[r] if part else firsts[r]
        chunks[r, part] = list(range(at, at + count))
        at += count
    return [*range(before), *chunks[rank, 0], *chunks[rank, 1], *range(total - after, total)]


def whole_mask(case: Case, q_len: int, kv_len: int, random: torch.Generator) -> torch.Tensor | None:
    """The mask of the whole call."""
    if case.mask == "none":
        return None
    heads = case.num_heads if case.mask.startswith("head") else 1
    if case.mask in ("keys", "own keys", "empty rank", "own bias"):
        mask = torch.rand(case.batch, 1, 1, kv_len, generator=random) > 0.3
        if case.mask == "empty rank":  # the keys of one rank are hidden
            mask[..., places(case.kv_lens, case.before, case.after, case.order, 0)] = False
        if case.mask == "own bias":
            return torch.randn(case.batch, 1, 1, kv_len, generator=random).to(getattr(torch, case.dtype))
        return mask
    if case.mask == "all":
        return torch.zeros(1, 1, q_len, kv_len, dtype=torch.bool)
    if case.mask.endswith("bias"):
        return (torch.randn(1, heads, q_len, kv_len, generator=random) * 2).to(getattr(torch, case.dtype))
    mask = torch.rand(case.batch, heads, q_len, kv_len, generator=random) > 0.4
    mask[:, :, : q_len // 3] = False  # rows without a key
    return mask


def check(ranks: tuple[int, ...], case: Case) -> dict[str, Any] | None:
    """Run a case; what differs from one process, None where nothing does."""
    rank = ranks.index(distributed.get_rank())
    random = torch.Generator().manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)
    q_len, kv_len = (case.before + sum(lens) + case.after for lens in (case.q_lens, case.kv_lens))

    def tensor(heads: int, length: int, size: int) -> torch.Tensor:
        return torch.randn(case.batch, heads, length, size, generator=random).to(dtype)

    query = tensor(case.num_heads, q_len, case.head_dim)
    key, value = tensor(case.num_kv_heads, kv_len, case.head_dim), tensor(case.num_kv_heads, kv_len, case.v_head_dim)
    mask = whole_mask(case, q_len, kv_len, random)
    call = AttentionCall(query, key, value, mask, case.is_causal, case.scale, case.num_heads != case.num_kv_heads)
    rows, columns = (
        torch.tensor(places(lens, case.before, case.after, case.order, rank), dtype=torch.int64)
        for lens in (case.q_lens, case.kv_lens)
    )
    mine = mask
    if mask is not None and mask.shape[2] > 1:
        mine = mask[:, :, rows]
    if mask is not None and case.mask.startswith("own"):
        mine = mask[..., columns]
    tensors = [query[:, :, rows], key[:, :, columns], value[:, :, columns]]
    if case.layout == "BSHD":
        tensors = [each.transpose(1, 2).contiguous() for each in tensors]
    found = attention(
        *tensors, mine, is_causal=case.is_causal, scale=case.scale, enable_gqa=call.enable_gqa, backend=case.backend,
        layout=case.layout, return_lse=case.lse, group=GROUPS[ranks], parallel=case.parallel,
        replicated_before=case.before, replicated_after=case.after, sequence_order=case.order,
    )  # fmt: skip
    output, lse = found if case.lse else (found, None)
    if case.layout == "BSHD":
        output = output.transpose(1, 2)
    expected = truth(call)
    whole = expected.clone()
    whole[:, :, rows] = output.double()
    limit = allowed(call, "half")
    if case.dtype == "float64":  # the log-sum-exp is float32
        limit = Error(max(limit.total, 1e-6), max(limit.worst_row, 1e-6))
    found_error, problems = error(whole, expected), []
    if output.dtype != dtype or output.shape != (*query.shape[:2], len(rows), case.v_head_dim):
        problems.append(f"{tuple(output.shape)} {output.dtype}")
    if not found_error.within(limit):
        problems.append(f"{found_error} > {limit}")
    if lse is not None:
        problems += _lse_problems(call, rows, lse)
    return {"case": case._asdict(), "problems": problems} if problems else None


def _lse_problems(call: AttentionCall, rows: torch.Tensor, lse: torch.Tensor) -> list[str]:
    key = call.key.double().repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
    scale = call.query.shape[3] ** -0.5 if call.scale is None else call.scale
    scores = call.query.double() @ key.mT * scale
    mask = call.attn_mask
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.double()
    if call.is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
    expected = scores.logsumexp(-1)[:, :, rows].float()
    loose = 0.05 if call.query.dtype in (torch.float16, torch.bfloat16) else 1e-4
    return (
        [] if torch.allclose(lse, expected, rtol=loose, atol=loose) else [f"lse off by {(lse - expected).abs().max()}"]
    )


def sweep(ranks: tuple[int, ...], parallel: str, first: int, count: int) -> list[Any]:
    """Random cases; those that are wrong."""
    found = []
    for seed in range(first, first + count):
        case = random_case(seed, len(ranks), parallel)
        try:
            wrong = check(ranks, case)
        except Exception as error:
            wrong = {"case": case._asdict(), "error": f"{type(error).__name__}: {error}"[:600]}
            if type(error).__name__ == "GroupError" or group_failed(ranks):
                return [*found, wrong]
        if wrong is not None:
            found.append(wrong)
    return found


def group_failed(ranks: tuple[int, ...]) -> bool:
    return rank_group(GROUPS[ranks]).failed is not None


def coverage(ranks: tuple[int, ...], first: int, count: int) -> dict[str, bool]:
    """Whether each kind of call is among the random cases of 2 and 4 ranks."""
    cases = [
        random_case(seed, size, kind)
        for seed in range(first, first + count)
        for size in (2, 4)
        for kind in ("ulysses", "ring")
    ]
    return {
        **{f"mask {mask}": any(case.mask == mask for case in cases) for mask in MASKS},
        **{dtype: any(case.dtype == dtype for case in cases) for dtype in DTYPES},
        "heads not divisible by ranks": any(case.num_heads % len(case.q_lens) for case in cases),
        "fewer heads than ranks": any(case.num_heads < len(case.q_lens) for case in cases),
        "fewer key heads than ranks": any(
            case.num_kv_heads < len(case.q_lens) and case.num_heads > case.num_kv_heads for case in cases
        ),
        "a rank without tokens": any(0 in case.q_lens and 0 in case.kv_lens for case in cases),
        "uneven": any(len(set(case.q_lens)) > 1 for case in cases),
        "causal": any(case.is_causal and case.order == "contiguous" for case in cases),
        "causal, balanced": any(case.is_causal and case.order == "balanced" for case in cases),
        "replicated": any(case.before and case.after for case in cases),
        "causal, replicated": any(case.is_causal and case.before for case in cases),
        "masked, replicated": any(case.mask != "none" and case.before for case in cases),
        "log-sum-exp": any(case.lse and case.mask != "none" for case in cases),
    }  # fmt: skip


def simple(ranks: tuple[int, ...], **arguments: Any) -> float:
    """A small call; how far it is off."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 4, 6 * len(ranks), 16)
    start = 6 * ranks.index(distributed.get_rank())
    tensors = [each[:, :, start : start + 6] for each in (query, key, value)]
    output = attention(*tensors, group=GROUPS[ranks], **arguments)
    return float((output - truth(AttentionCall(query, key, value))[:, :, start : start + 6]).abs().max())


def reported(ranks: tuple[int, ...], broken: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    """A small call whose kernel is broken on one rank: its error, and the rows and notes of its report.

    `broken`: `rank`, `backend`, and `how`: the name of an exception, or `zeros`.
    """
    if distributed.get_rank() == broken["rank"]:
        break_kernel(broken["backend"], broken["how"])
    with account() as report:
        off = simple(ranks, **arguments)
    rows = sorted((row.backend, row.calls) for row in report.rows.values())
    return {"off": off, "rows": rows, "notes": [*report.notes]}


def break_kernel(backend: str, how: str) -> None:
    """Replace the kernels of a backend in this process."""

    def broken(call: AttentionCall) -> Any:
        if how == "zeros":
            return torch.zeros_like(call.query)
        raise (torch.OutOfMemoryError if how == "OutOfMemoryError" else RuntimeError)(f"{backend} is broken")

    router = router_for()
    router.unavailable(backend)
    router._kernels[backend, ()] = router._lse[backend, ()] = broken


def guarded(ranks: tuple[int, ...], broken: dict[str, Any]) -> dict[str, Any]:
    """`reported` with an inexact backend under a guard that enforces."""
    with attention_backend({"default": "emulated_int8", "guard": "enforce"}, accuracy="quantized"):
        return reported(ranks, broken, parallel="ulysses")


def caught(ranks: tuple[int, ...], broken: dict[str, Any], **arguments: Any) -> list[str]:
    """What two calls raise, where a kernel fails on one rank for good; the caller goes on after each."""
    found = []
    for _ in range(2):
        try:
            reported(ranks, broken, **arguments)
            found.append("")
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def many(ranks: tuple[int, ...], count: int, late: int | None = None, **arguments: Any) -> str:
    """Calls until one fails; `late`: this rank makes none."""
    try:
        if distributed.get_rank() == late:
            select.select([], [], [], 60)
        for _ in range(count):
            simple(ranks, **arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def growth(ranks: tuple[int, ...], count: int) -> dict[str, int]:
    """How much the process's memory in KiB, and what it keeps, grow over so many calls after some."""
    of = rank_group(GROUPS[ranks])
    sizes = []
    for calls in (60, count):
        for number in range(calls):
            simple(ranks, parallel=("ulysses", "ring")[number % 2])
        gc.collect()
        sizes.append((resident(), len(of.agreed), len(gc.get_objects()), threading.active_count()))
    names = ("memory", "agreed", "objects", "threads")
    return {name: after - before for name, before, after in zip(names, *sizes, strict=True)}


def resident() -> int:
    """Memory of this process in KiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4


def chosen(ranks: tuple[int, ...], speeds: list[float]) -> dict[str, Any]:
    """What `auto` takes where the link has these speeds, and where it is measured; the measured link."""
    found, group, links = [], rank_group(GROUPS[ranks]), []
    for speed in (*speeds, None):
        link = None if speed is None else strategy.link_of(speed, 1e-6, 1e12, 1e12)
        group.link = link
        query = torch.randn(1, 4, 1024, 64)
        with account() as report:
            for _ in range(1 if link else 2):
                attention(query, query, query, group=GROUPS[ranks], parallel="auto")
                links.append(group.link)
        found.append([*report.notes])
    last = links[-1]
    numbers = [last.exchange.measured, last.to_next.measured, last.flops, last.copied_per_second]
    return {"notes": found, "link": numbers, "measured once": links[-2] is last}


def sparse(ranks: tuple[int, ...], parallel: str) -> dict[str, Any]:
    """A sparse method on a grid over the ranks, compared with the same in one process."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 4, 512, 32)
    size, rank = 512 // len(ranks), ranks.index(distributed.get_rank())
    at = slice(size * rank, size * (rank + 1))
    with attention_backend({"default": {"backend": "video_sparse_attn", "extra": {"sparsity": 0.5}}}):
        with account() as alone:
            expected = attention(query, key, value, grid=(8, 8, 8))
        parts = (each[:, :, at] for each in (query, key, value))
        with account() as report:
            output = attention(*parts, grid=(8, 8, 8), group=GROUPS[ranks], parallel=parallel)
    exact = truth(AttentionCall(query, key, value))
    return {
        "off": float((output - expected[:, :, at]).abs().max()),
        "from exact": float((expected - exact).abs().max()),
        "alone": sorted(row.backend for row in alone.rows.values()),
        "rows": sorted(row.backend for row in report.rows.values()),
        "notes": [*report.notes],
    }


def refused(ranks: tuple[int, ...], arguments: dict[str, list[Any]]) -> str:
    """What a call raises; each rank has its own arguments."""
    mine = {name: values[ranks.index(distributed.get_rank())] for name, values in arguments.items()}
    try:
        return str(simple(ranks, **mine))
    except Exception as error:
        return str(error)


def strictly(ranks: tuple[int, ...], lacking: int) -> str:
    """What a call raises whose backend one rank lacks."""
    if distributed.get_rank() == lacking:
        router_for()._unavailable["sdpa_math"] = ("not here",)
    try:
        return str(simple(ranks, backend={"default": "sdpa_math", "strict": True}))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def diffusers_guarded(
    ranks: tuple[int, ...], guard: str, wrong: int, role: str = "self", lacking: bool = False
) -> dict[str, Any]:
    """Four forwards of a divided model of two blocks with an inexact kernel in one role.

    `wrong`: the call of it on rank 0, from 1, whose output is not finite. `lacking`: rank 1 has no such kernel.
    """
    import sys
    from pathlib import Path

    sys.path.append(str(Path(__file__).parent / "integrations"))
    import tiny_diffusers as tiny
    from attention_backends.integrations.diffusers import apply, reset
    from diffusers import ContextParallelConfig

    torch.accelerator.device_count = lambda: 1  # Diffusers divides by it, and there is no accelerator
    calls, router = 0, router_for()
    kernel = router.kernel("emulated_int8")

    def broken(call: AttentionCall) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return kernel(call) * float("nan" if calls == wrong and distributed.get_rank() == 0 else 1)

    router._kernels["emulated_int8", ()] = broken
    if lacking and distributed.get_rank() == 1:
        router._unavailable["emulated_int8"] = ("not here",)
    made, given = tiny.wan()
    expected = tiny.forward(made, given)[0]
    made.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    config = {"default": "torch_sdpa", "per_role": {role: "emulated_int8"}, "guard": guard}
    applied = apply(made, config)
    outputs = [tiny.forward(made, given)[0] for _ in range(4)]
    run_report = applied.reports["model"]
    reset(made)
    router._kernels["emulated_int8", ()] = kernel
    router._unavailable["emulated_int8"] = ()
    return {
        "errors": [float((output - expected).abs().max()) for output in outputs],
        "checked": sum(row.guard.checked for row in run_report.rows.values() if row.guard is not None),
        "rows": sorted([row.role, row.backend, row.calls, str(row.reason)] for row in run_report.rows.values()),
        "notes": [str(note) for note in run_report.notes],
    }


def diffusers_model(
    ranks: tuple[int, ...], model: str, parallel: dict[str, Any], backend: Any, first: bool = False,
    compiled: bool = False, wide: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A forward of a tiny model of Diffusers, divided as its `enable_parallelism` does, against the whole one.

    `backend`: a configuration, or one for each rank in a list. `first`: it is chosen before the model is divided.
    `compiled`: the blocks are. `wide`: under autocast, with queries and keys in float32 and values in bfloat16.
    """
    import sys
    from pathlib import Path

    sys.path.append(str(Path(__file__).parent / "integrations"))
    import tiny_diffusers as tiny
    from attention_backends.integrations.diffusers import apply, reset
    from diffusers import ContextParallelConfig

    torch.accelerator.device_count = lambda: 1  # Diffusers divides by it, and there is no accelerator
    made, given = getattr(tiny, model)()
    for path, module in made.named_modules():
        if wide and path.endswith(("norm_q", "norm_k")):
            module.register_forward_hook(lambda module, given, output: output.float())
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=wide)
    with autocast:
        expected = tiny.forward(made, given)[0]
    if isinstance(backend, list):
        backend = backend[distributed.get_rank()]
    applied = apply(made, backend) if first else None
    made.enable_parallelism(config=ContextParallelConfig(**parallel))
    applied = applied or apply(made, backend)
    if compiled:
        made.compile_repeated_blocks(backend="eager")  # hooks of Diffusers break the graph
    with autocast:
        outputs = [tiny.forward(made, given)[0] for _ in range(2)]
    run_report = applied.reports["model"]
    reset(made)
    if not wide and "ulysses_degree" in parallel:  # Diffusers' native attention has no ring
        outputs.append(tiny.forward(made, given)[0])
    return {
        "error": max(float((output - expected).abs().max()) for output in outputs),
        "size": float(expected.abs().max()),
        "rows": sorted([row.role, row.backend, row.calls, str(row.reason)] for row in run_report.rows.values()),
        "notes": [str(note) for note in run_report.notes],
    }
