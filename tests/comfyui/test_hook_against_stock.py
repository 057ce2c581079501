"""The hook against each of ComfyUI's own attention functions, on random calls: what stock answers, we answer.

A case is drawn from its number alone. Where stock gives a result, ours has its shape and dtype and the same numbers: to
the bit where the same function runs on the same tensors, else with at most twice stock's own error against float64.
Where stock refuses, we refuse, or give what ComfyUI's PyTorch attention gives. A call whose tensors agree runs on the
backend that was asked for.

Mutants of the hook, each with one mistake, must fail the same test.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from attention_backends.backends.engine.call_checks import CheckError  # noqa: E402
from attention_backends.backends.values.masks import as_additive  # noqa: E402
from attention_calls import as_comfyui_runs  # noqa: E402
from hook_side import comfyui, host, masks, no_environment, nodes_module, override  # noqa: E402

layouts, hook_calls = nodes_module("hook.layouts"), nodes_module("hook.hook_calls")
hook_plans = nodes_module("hook.hook_plans")

FUNCTIONS = ("pytorch", "sub_quad", "split", "basic")
BACKENDS = ("auto", "comfy", "torch_sdpa", "sdpa_math", "sdpa_flash", "reference")
RUN_ANY_CALL = ("comfy", "torch_sdpa", "sdpa_math", "reference")
"""Those that take every call whose tensors agree."""
DTYPES = (torch.float32, torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.uint8)
FEW, MANY, AT_ONCE = 500, 5000, 50


@dataclass
class Case:
    """One call; `agrees` where nothing in it is odd."""

    number: int
    func: str
    backend: str
    tensors: list[torch.Tensor]
    heads: int
    mask: torch.Tensor | None = None
    flags: dict[str, Any] = field(default_factory=dict)
    odd: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        given = [
            f"{tuple(t.shape)} {t.dtype} {t.device} {t.stride()}" for t in (*self.tensors, self.mask) if t is not None
        ]
        return f"case {self.number}: {self.func}, {self.backend}, {given}, {self.heads} heads, {self.flags}, {self.odd}"


class Draw(random.Random):
    """Draws a case."""

    def chance(self, share: float) -> bool:
        return self.random() < share

    def case(self, number: int) -> Case:
        func, backend = self.choice(FUNCTIONS), self.choice(BACKENDS)
        heads, head_dim, batch = self.choice((1, 2, 4)), self.choice((8, 16, 20)), self.choice((1, 2, 3, 4))
        q_len, kv_len = self.choice((1, 5, 8, 12)), self.choice((1, 6, 8, 12, 24))
        odd: list[str] = []
        flags: dict[str, Any] = {}
        skip = self.chance(0.5)
        kv_heads = heads
        if self.chance(0.25):
            flags["enable_gqa"] = True
            kv_heads = self.choice([n for n in (1, 2, 4) if heads % n == 0])
        sizes = [[batch, heads, q_len, head_dim], *([batch, kv_heads, kv_len, head_dim] for _ in range(2))]
        if self.chance(0.25):
            odd.append(self.disagree(sizes, func))
        tensors = [self.tensor(size, skip) for size in sizes]
        if not skip and self.chance(0.2):
            self.fold(tensors, batch)
        dtype = self.choice(DTYPES)
        tensors = [tensor.to(dtype) for tensor in tensors]
        if self.chance(0.08):
            odd.append("dtypes")
            which = self.choice(((1,), (2,), (1, 2), (0,)))
            other = self.choice(DTYPES)
            tensors = [tensor.to(other) if at in which else tensor for at, tensor in enumerate(tensors)]
        if self.chance(0.1) and func == "pytorch":  # the others read what a tensor without memory happens to point at
            odd.append("device")
            tensors[self.randrange(3)] = tensors[0].to("meta")
        mask = None
        if self.chance(0.6):
            mask = self.mask(tensors[0].dtype, batch, heads, q_len, kv_len, odd)
        self.flag(flags, func, odd)
        if skip:
            flags["skip_reshape"] = True
        return Case(number, func, backend, tensors, heads, mask, flags, odd)

    def disagree(self, sizes: list[list[int]], func: str) -> str:
        """Change a size of one tensor, or of key and value, or make one of all of them 0."""
        axis = self.randrange(4)
        if self.chance(0.3):
            for size in sizes if axis != 2 or self.chance(0.3) else sizes[:1] if self.chance(0.5) else sizes[1:]:
                size[axis] = 0
            return f"axis {axis} is 0"
        which = self.choice(((0,), (1,), (2,), (1, 2)))
        if (axis, which) == (3, (2,)) and func != "pytorch":  # only that one has values of another head size
            which = (1,)
        for at in which:
            sizes[at][axis] = self.choice([1, sizes[at][axis] * 2, max(sizes[at][axis] // 2, 1)])
        return f"axis {axis} of {which}"

    def tensor(self, size: list[int], skip: bool) -> torch.Tensor:
        """(B, H, S, D), or (B, S, H*D), in one of the ways in which it may lie in memory."""
        batch, heads, length, head_dim = size
        seed = torch.Generator().manual_seed(self.randrange(2**31))
        shape = (batch, heads, length, head_dim) if skip else (batch, length, heads * head_dim)
        how = self.choice(("plain", "plain", "fused", "swapped", "spread", "expanded", "later"))
        if how == "fused":
            return torch.randn(*shape[:-1], 3 * shape[-1], generator=seed)[..., shape[-1] : 2 * shape[-1]]
        if how == "swapped":
            a, b = (1, 2) if skip else (0, 1)
            turned = list(shape)
            turned[a], turned[b] = turned[b], turned[a]
            return torch.randn(turned, generator=seed).transpose(a, b)
        if how == "spread":
            return torch.randn(*shape[:-1], 2 * shape[-1], generator=seed)[..., ::2]
        if how == "expanded" and batch:
            return torch.randn(1, *shape[1:], generator=seed).expand(shape)
        if how == "later":
            return torch.randn(batch + 1, *shape[1:], generator=seed)[1:]
        return torch.randn(shape, generator=seed)

    def fold(self, tensors: list[torch.Tensor], batch: int) -> None:
        """Give keys and values another batch, or their heads apart, with the same elements a sample."""
        for at in (1, 2):
            elements = tensors[at]
            if self.chance(0.3) and elements.ndim == 3:
                tensors[at] = elements.unflatten(2, (-1, 4)) if elements.shape[2] % 4 == 0 and at == 2 else elements
            if batch > 1 and elements.numel() and self.chance(0.8):
                tensors[at] = elements.reshape(1, -1, elements.shape[-1])

    def mask(self, dtype: torch.dtype, batch: int, heads: int, q_len: int, kv_len: int, odd: list[str]) -> torch.Tensor:
        shape = [self.choice((1, batch)), self.choice((1, heads)), self.choice((1, q_len)), kv_len]
        if self.chance(0.1):
            axis = self.randrange(4)
            shape[axis] = self.choice((1, shape[axis] + 1, shape[axis] * 2))
            odd.append(f"mask axis {axis}")
        shape = shape[self.choice((0, 0, 0, 0, 0, 1, 1, 2, 2, 2)) :]
        if len(shape) == 3:
            shape[0] = self.choice((1, batch))
        if self.chance(0.03):
            shape = self.choice(([kv_len], [1, *shape[-3:], kv_len][:5]))
            odd.append("mask dimensions")
        seed = torch.Generator().manual_seed(self.randrange(2**31))
        visible = torch.ones(shape, dtype=torch.bool)
        how = self.choice(("all", "suffix", "gap", "random", "samples", "causal", "row", "bias"))
        if visible.ndim < 2:
            how = "suffix"
        if how == "suffix":
            visible[..., visible.shape[-1] // 2 + 1 :] = False
        elif how == "gap":
            visible[..., 1 : visible.shape[-1] // 2] = False
        elif how == "random":
            visible = torch.rand(shape, generator=seed) > 0.4
        elif how == "samples":
            for sample in range(visible.shape[0]):
                visible[sample, ..., visible.shape[-1] - sample - 1 :] = False
        elif how == "causal":
            visible = visible.tril()
        elif how == "row":
            visible[..., :1, :] = False
        if how not in ("row", "causal"):
            visible[..., 0] = True
        bias = torch.randn(shape, generator=seed) if how == "bias" or self.chance(0.3) else torch.zeros(shape)
        kind = self.choice(("bool", "own", "own", "float32", "other", "integer"))
        if kind == "bool":
            return visible
        if kind == "integer":
            return (bias * 2).abs().to(self.choice(INTEGERS))
        numbers = {"own": dtype, "float32": torch.float32, "other": self.choice(DTYPES)}[kind]
        if numbers not in (dtype, torch.float32):
            odd.append("mask dtype")
        hidden = self.choice((-torch.inf, torch.finfo(numbers).min / 2)) if how != "row" else -torch.inf
        mask = bias.to(numbers).masked_fill(~visible, hidden)
        if mask.ndim > 1 and mask.shape[-2] == 1 and self.chance(0.2):
            return mask.expand(*mask.shape[:-2], q_len, mask.shape[-1])
        return mask

    def flag(self, flags: dict[str, Any], func: str, odd: list[str]) -> None:
        if self.chance(0.3):
            flags["scale"] = self.choice((0.1, 1.0, 0.5, 1))
        if self.chance(0.2):
            flags["attn_precision"] = self.choice((None, torch.float32))
        if self.chance(0.3):
            flags["skip_output_reshape"] = True
        if self.chance(0.2):
            flags["low_precision_attention"] = self.choice((False, True))


def draw(number: int) -> Case:
    return Draw(f"hook against stock {number}").case(number)


class Stock:
    """ComfyUI's functions, and one of our overrides for each backend, used for many cases."""

    def __init__(self, functions: Any) -> None:
        self.functions = functions
        self.overrides = {backend: override(backend) for backend in BACKENDS}

    def __call__(self, case: Case, func: str = "", **changes: Any) -> torch.Tensor:
        """What a function gives without us."""
        given = {"mask": case.mask, **case.flags, **changes}
        tensors = given.pop("tensors", case.tensors)
        output: torch.Tensor = getattr(self.functions, f"attention_{func or case.func}")(*tensors, case.heads, **given)
        return output

    def ours(self, case: Case) -> tuple[torch.Tensor, list[tuple[str, str]]]:
        """What it gives with us, and the backend and mask of every row that counted it."""
        ours = self.overrides[case.backend]
        before = calls_of(ours)
        options = {"optimized_attention_override": ours}
        output = self(case, transformer_options=options)
        return output, [row for row, calls in calls_of(ours).items() if calls > before.get(row, 0)]

    def expected(self, case: Case) -> torch.Tensor | None:
        """What stock answers; None where it refuses.

        Three of its functions add a boolean mask to the scores, or take a row of it for a sample. We read it as its
        PyTorch attention does, so they get its numbers, and what they make of its booleans counts only else.
        """
        mask = case.mask
        wide = mask is not None and (case.tensors[0].dtype, mask.dtype) == (torch.float64, torch.float32)
        if wide and case.backend != "comfy":  # PyTorch's CPU kernel reads the mask's memory as float64
            return attempt(lambda: self(case, mask=mask.double()))
        if mask is not None and mask.dtype == torch.bool and case.func != "pytorch":
            found = attempt(lambda: self(case, mask=as_additive(mask, case.tensors[0].dtype)))
            if found is not None:
                return found
        return attempt(lambda: self(case))

    def truth(self, case: Case) -> torch.Tensor | None:
        """ComfyUI's PyTorch attention in float64; None where it refuses."""
        mask = case.mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.double()
        tensors = [tensor.double() for tensor in case.tensors]
        return attempt(lambda: self(case, "pytorch", tensors=tensors, mask=mask))

    def check(self, case: Case) -> None:
        """Fail where ours is not what stock gives."""
        expected = self.expected(case)
        try:
            found, rows = self.ours(case)
        except CheckError as error:
            if tokens(case, 1) == tokens(case, 2):  # else PyTorch reads memory beyond its values
                raise AssertionError(f"{case}\n{error}") from error
            return
        except Exception as error:
            if expected is None:
                return
            raise AssertionError(f"{case}\nstock answers, ours: {type(error).__name__}: {error}") from error
        truth = self.truth(case)
        if expected is None:
            assert case.func != "pytorch", f"{case}\nstock refuses, ours answers"
            assert truth is not None, f"{case}\nevery function of stock refuses, ours answers"
            expected = truth.to(found.dtype)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), f"{case}\n{found.shape} {found.dtype}"
        assert found.device == expected.device, case
        if found.device.type == "meta":
            return
        if not case.odd and case.backend in RUN_ANY_CALL and kernels_take(case):
            assert {backend for backend, _ in rows} == {case.backend}, f"{case}\nran on {rows}"
        finite = expected.isfinite()  # stock's NaN, for a row without a key, may be a number here
        assert found[finite].isfinite().all(), f"{case}\nnot finite where stock is"
        if is_the_same_call(case, rows):
            assert torch.equal(found[finite], expected[finite]), f"{case}\nnot equal to the bit on {rows}"
            return
        close(case, found, expected, truth, finite)


def close(
    case: Case, found: torch.Tensor, expected: torch.Tensor, truth: torch.Tensor | None, finite: torch.Tensor
) -> None:
    if truth is None or truth.shape != found.shape:
        truth = expected.double()
    if not found[finite].numel():
        return
    seen = finite & ~hidden_rows(case, found.shape)
    errors = [(one.double() - truth)[seen].abs() for one in (found, expected)]
    ours, stock = (float(error.max()) if error.numel() else 0.0 for error in errors)
    size = float(truth[seen].abs().max()) if seen.any() else 0.0
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (found, *case.tensors))
    assert ours <= 2 * stock + 32 * eps * max(size, 1e-3), f"{case}\nerror {ours}, stock {stock}"


def hidden_rows(case: Case, shape: torch.Size) -> torch.Tensor:
    """Places of the output of rows that see no key: ours, as SDPA's, are 0, and stock's may be a mean."""
    nothing = torch.zeros(shape, dtype=torch.bool)
    mask = case.mask
    if mask is None or mask.ndim not in (2, 3, 4) or len(shape) not in (3, 4):
        return nothing
    visible = mask if mask.dtype == torch.bool else mask > -torch.inf
    rows = ~visible.any(-1)
    while rows.ndim < 3:
        rows = rows.unsqueeze(-2)
    if len(shape) == 4:
        return rows[..., None].expand(shape) if rows.shape[-1] in (1, shape[2]) else nothing
    if rows.shape[1] not in (1, case.heads) or rows.shape[2] not in (1, shape[1]) or rows.shape[0] not in (1, shape[0]):
        return nothing
    whole = rows.expand(shape[0], case.heads, shape[1]).transpose(1, 2)
    return whole[..., None].expand(*whole.shape, shape[2] // case.heads).flatten(2)


def is_the_same_call(case: Case, rows: list[tuple[str, str]]) -> bool:
    """Whether what ran is the function of `Stock.expected`, on the same tensors."""
    ((backend, mask),) = rows if len(rows) == 1 else [("", "")]
    boolean = case.mask is not None and case.mask.dtype == torch.bool
    if backend == "comfy":
        return case.func == "pytorch" or not boolean
    whole = mask in ("none", "bool", "key_padding", "bias")
    return whole and backend == "torch_sdpa" and case.func == "pytorch"


def kernels_take(case: Case) -> bool:
    """Whether the dtype of the mask is one that stock's function and our kernels run; other masks are stock's."""
    mask = case.mask
    return mask is None or mask.dtype in (torch.bool, torch.float32, case.tensors[0].dtype) or case.func != "pytorch"


def tokens(case: Case, which: int) -> int:
    """Tokens of key or value, up to a factor that both have."""
    tensor = case.tensors[which]
    return tensor.shape[2] if case.flags.get("skip_reshape") and tensor.ndim == 4 else tensor.numel()


def calls_of(ours: Any) -> dict[tuple[str, str], int]:
    run = host._outside_runs.get(ours)
    if run is None:
        return {}
    found: dict[tuple[str, str], int] = {}
    for row in run.run_report.rows.values():
        found[row.backend, row.mask] = found.get((row.backend, row.mask), 0) + row.calls
    return found


def attempt(run: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    try:
        return run()
    except Exception:
        return None


def check_all(stock: Stock, numbers: range) -> None:
    """Check these cases; every third once more, with the same values elsewhere in memory."""
    for number in numbers:
        case = draw(number)
        stock.check(case)
        if number % 3 == 0:
            stock.check(replace(case, tensors=[relaid(tensor) for tensor in case.tensors]))


def relaid(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_contiguous():
        return torch.stack([tensor, torch.zeros_like(tensor)], -1)[..., 0]
    return tensor.contiguous()


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stock]:
    comfyui()
    no_environment(monkeypatch)
    import comfy.ldm.modules.attention as functions

    if not hasattr(functions, "_reshape_qkv_to_heads"):
        pytest.skip("this ComfyUI's functions know neither scale nor enable_gqa")
    with as_comfyui_runs():
        yield Stock(functions)
    host._outside_runs.clear()


@pytest.mark.comfy
@pytest.mark.parametrize("first", range(0, FEW, AT_ONCE))
def test_ours_is_what_stock_gives(stock: Stock, first: int) -> None:
    check_all(stock, range(first, first + AT_ONCE))


@pytest.mark.comfy
@pytest.mark.slow
@pytest.mark.parametrize("first", range(FEW, FEW + MANY, AT_ONCE))
def test_ours_is_what_stock_gives_in_many_more(stock: Stock, first: int) -> None:
    check_all(stock, range(first, first + AT_ONCE))


# Mutants


def no_scale(patch: pytest.MonkeyPatch) -> None:
    init = layouts.Layout.__init__
    patch.setattr(
        layouts.Layout,
        "__init__",
        lambda self, *given: (init(self, *given), setattr(self, "scale", None))[0],
    )


def own_batch(patch: pytest.MonkeyPatch) -> None:
    """Keys and values are viewed by their own batch."""
    splits = layouts.splits_of

    def by_own_batch(*given: Any) -> Any:
        return tuple(
            (tensor.shape[0], size[0] * size[1] // tensor.shape[0], *size[2:])
            for tensor, size in zip(given[:3], splits(*given), strict=True)
        )

    patch.setattr(layouts, "splits_of", by_own_batch)


def strides_ignored(patch: pytest.MonkeyPatch) -> None:
    """The view of the first tensor of a shape is taken for every other."""

    class First(dict[Any, Any]):
        def get(self, stride: Any, default: Any = None) -> Any:
            return next(iter(self.values()), default)

    init = layouts.Views.__init__
    patch.setattr(
        layouts.Views,
        "__init__",
        lambda self, *given: (init(self, *given), setattr(self, "known", First()))[0],
    )


def masks_by_head(patch: pytest.MonkeyPatch) -> None:
    """(B, Lq, Lk) is read as (H, Lq, Lk)."""
    for module in (layouts, hook_calls, masks):
        right = module.as_4d
        patch.setattr(module, "as_4d", lambda mask, right=right: mask[None] if mask.ndim == 3 else right(mask))


def no_mask(patch: pytest.MonkeyPatch) -> None:
    call = layouts.Layout.call
    patch.setattr(layouts.Layout, "call", lambda self, query, key, value, mask: call(self, query, key, value, None))


def no_groups(patch: pytest.MonkeyPatch) -> None:
    init = layouts.Layout.__init__
    patch.setattr(
        layouts.Layout,
        "__init__",
        lambda self, *given: (init(self, *given), setattr(self, "enable_gqa", False))[0],
    )


def always_flat(patch: pytest.MonkeyPatch) -> None:
    """`skip_output_reshape` is ignored."""
    init = layouts.Layout.__init__
    patch.setattr(
        layouts.Layout,
        "__init__",
        lambda self, *given: (init(self, *given), setattr(self, "skip_output_reshape", False))[0],
    )


def anything_goes(patch: pytest.MonkeyPatch) -> None:
    """Nobody looks whether the tensors of a call agree."""
    patch.setattr(hook_plans, "only_comfy", lambda *given: "")


def any_mask_dtype(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(hook_calls, "_in_a_dtype_to_add", lambda mask, query, func: mask)


def every_mask_added(patch: pytest.MonkeyPatch) -> None:
    """Masks that ComfyUI's function would refuse are added."""
    patch.setattr(hook_calls, "ADD_ANY_MASK", tuple(f"attention_{name}" for name in FUNCTIONS))


def no_way_out(patch: pytest.MonkeyPatch) -> None:
    """ComfyUI's function is never the one that runs last."""
    patch.setattr(hook_calls, "_host_call", lambda *given: None)


MUTANTS = (
    *(no_scale, own_batch, strides_ignored, masks_by_head, no_mask, no_groups, always_flat, anything_goes),
    *(every_mask_added, any_mask_dtype, no_way_out),
)


@pytest.mark.comfy
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_mistake_in_the_hook_is_seen(
    stock: Stock, mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant(monkeypatch)
    with pytest.raises(AssertionError, match="case"):
        check_all(stock, range(FEW))
