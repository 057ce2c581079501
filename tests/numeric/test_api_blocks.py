"""Where a call gets its backend from, and that nothing is left of a `with` that ended, however it ended."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

from api_calls import K, Q, V, nothing_in_force, ran  # noqa: E402, F401
from attention_backends.backends import (  # noqa: E402
    account,
    api,
    attention,
    attention_backend,
    checks,
    force_backend,
    read_environment,
)
from attention_backends.backends.api import context as model_calls  # noqa: E402
from attention_backends.backends.config import AttentionConfig  # noqa: E402
from attention_backends.backends.config.names import UnknownBackendError  # noqa: E402
from attention_backends.backends.values.errors import (  # noqa: E402
    ConfigError,
    NoBackendError,
)
from torch.nn.functional import scaled_dot_product_attention as sdpa  # noqa: E402

pytestmark = pytest.mark.usefixtures("nothing_in_force")
CPU = torch.device("cpu")


# Where the backend comes from


def test_context_then_environment_then_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ran() == "torch_sdpa"
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "_native_math")
    assert ran() == "sdpa_math"  # the block of the account reads it
    monkeypatch.setenv("DIFFUSION_ATTENTION_BACKEND", "REFERENCE")
    assert ran() == "reference"
    with attention_backend("native"):
        assert ran() == "torch_sdpa"
        with attention_backend({"per_role": {"cross": "sdpa_math"}}):
            assert ran() == "torch_sdpa"
            assert ran(role="cross") == "sdpa_math"
            assert ran(role="ltx2.audio_to_video") == "sdpa_math"
            assert ran(role="cross", backend="reference") == "reference"
        assert ran(role="cross") == "torch_sdpa"
    with attention_backend({"per_role": {"cross": "sdpa_math"}}):
        assert ran() == "reference"  # what the block does not say is left to the environment
    assert ran() == "reference"


@pytest.mark.parametrize("word", ["autotune", "measured"])
def test_autotune_has_an_older_name(word: str) -> None:
    with account() as run_report:
        attention(Q, K, V, backend=word)
        with attention_backend(word):
            attention(Q, K, V)
    assert {row.asked for row in run_report.rows.values()} == {"autotune"}
    with pytest.raises(ConfigError, match="autotune"), force_backend(word):
        pass


def test_outside_a_block_the_environment_is_read_once_or_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def backends() -> set[str]:
        model_calls.thread_local.__dict__.clear()
        attention(Q, K, V)
        return {row.backend for row in model_calls.thread_local.own.run_report.rows.values()}

    assert backends() == {"torch_sdpa"}
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "_native_math")
    assert backends() == {"torch_sdpa"}
    read_environment()
    assert backends() == {"sdpa_math"}


@pytest.mark.parametrize(
    "form",
    [
        "sdpa_math",
        {"default": "sdpa_math"},
        '{"default": {"backend": "sdpa_math"}}',
        "default:\n  backend: sdpa_math",
        "backend=sdpa_math",
        "--diffusion-attention-config.default.backend SDPA_MATH",
        AttentionConfig(default=api.parse_config("sdpa_math").default),
    ],
    ids=["name", "dict", "json", "yaml", "pairs", "flags", "config"],
)
def test_a_block_takes_every_form_of_a_configuration(form: object, tmp_path: Path) -> None:
    with attention_backend(form):
        assert ran() == "sdpa_math"
    with force_backend(form):
        assert ran(backend="reference") == "sdpa_math"


def test_accuracy_and_strict_of_a_block(snapshot: SnapshotAssertion) -> None:
    with attention_backend("emulated_int8", accuracy="quantized"):
        assert ran() == "emulated_int8"
    with attention_backend("sage_attn", strict=False):
        assert ran() == "torch_sdpa"
    with (
        pytest.raises(ConfigError) as caught,
        attention_backend("native", accuracy="best"),
    ):
        pass
    assert str(caught.value) == snapshot


def test_strictness_of_an_outer_block_holds_inside_unless_switched_off() -> None:
    with attention_backend("native", strict=True):
        with pytest.raises(NoBackendError, match="cudnn_attn: needs an NVIDIA GPU"), attention_backend("cudnn_attn"):
            pass
        with pytest.raises(NoBackendError, match="cudnn_attn: needs an NVIDIA GPU"):
            attention(Q, K, V, backend="cudnn_attn")
        with attention_backend("cudnn_attn", strict=False):
            assert ran() == "torch_sdpa"


def test_a_force_overrides_everything_inside_and_is_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTENTION_BACKENDS_CONFIG", "per_role.self=reference")
    with attention_backend("reference"), force_backend("sdpa_math"):
        assert ran() == "sdpa_math"
        with attention_backend({"default": "reference", "per_role": {"self": "reference"}}, strict=False):
            assert ran(role="self") == ran(backend="reference") == "sdpa_math"
        with force_backend("native"):
            assert ran() == "torch_sdpa"
        assert ran() == "sdpa_math"
        wide = torch.randn(1, 2, 4, 300)
        narrow = force_backend("emulated_int8")
        with narrow, pytest.raises(NoBackendError, match=r"emulated_int8: .*\n"):
            attention(wide.half(), wide.half(), wide.half(), torch.ones(1, 2, 4, 4), is_causal=True)
    assert ran() == "reference"


@pytest.mark.parametrize(
    ("block", "error"),
    [
        (lambda: attention_backend("no_such_thing"), UnknownBackendError),
        (lambda: attention_backend({"default": 3}), ConfigError),
        (lambda: attention_backend("flash_attn", strict=True), NoBackendError),
        (lambda: attention_backend({"per_role": {"cross": "cudnn"}, "strict": True}), NoBackendError),
        (lambda: force_backend("no_such_thing"), UnknownBackendError),
        (lambda: force_backend("cudnn_attn", device=CPU), NoBackendError),
        (lambda: force_backend("auto"), ConfigError),
        (lambda: force_backend({"per_role": {"self": "reference"}}), ConfigError),
    ],
)
def test_a_block_that_cannot_hold_raises_on_entering_and_changes_nothing(
    block: Callable[[], contextlib.AbstractContextManager[None]], error: type[Exception]
) -> None:
    with attention_backend("sdpa_math"):
        before = model_calls.current()
        with pytest.raises(error) as caught, block():
            pytest.fail("it was entered")
        assert model_calls.current() is before
        assert ran() == "sdpa_math"
    if error is NoBackendError:
        *lines, advice = str(caught.value).splitlines()
        machine = next(number for number, line in enumerate(lines) if "machine: cpu" in line)
        assert any(re.match(r"  \w+: .", line) for line in lines[machine + 1 :])
        assert "choose one" in advice


# A block ends with nothing left of it


def test_an_exception_restores_what_was_there() -> None:
    with attention_backend("sdpa_math"):
        before = model_calls.current()
        with pytest.raises(KeyError), attention_backend("reference"), force_backend("native"):
            raise KeyError
        assert model_calls.current() is before
        assert ran() == "sdpa_math"
    assert ran() == "torch_sdpa"


def test_blocks_of_generators_may_end_in_any_order() -> None:
    def holding(backend: str) -> Iterator[str]:
        with attention_backend(backend):
            yield ran()
            yield ran()

    one, two = holding("sdpa_math"), holding("reference")
    assert (next(one), next(two)) == ("sdpa_math", "reference")
    one.close()  # before the block that was entered inside it
    assert ran() == next(two) == "reference"
    two.close()
    assert ran() == "torch_sdpa"


@pytest.mark.parametrize("seed", range(20))
def test_the_block_that_was_entered_last_and_is_still_open_counts(seed: int) -> None:
    def holding(backend: str) -> Iterator[None]:
        with attention_backend(backend):
            yield

    order = Random(seed)
    names = ["sdpa_math", "reference", "torch_sdpa", "emulated_int8"]
    held: list[tuple[str, Iterator[None]]] = []
    for _ in range(40):
        if held and order.random() < 0.5:
            held.pop(order.randrange(len(held)))[1].close()  # type: ignore[attr-defined]
        else:
            name = order.choice(names)
            held.append((name, holding(name)))
            next(held[-1][1])
        layers = model_calls.current().layers
        assert [layer.default.backend for layer in layers] == [name for name, _ in reversed(held)]
    for _, generator in held:
        generator.close()  # type: ignore[attr-defined]


def test_a_generator_that_another_thread_finishes_leaves_nothing_here() -> None:
    def holding() -> Iterator[None]:
        with attention_backend("sdpa_math"):
            yield

    generator = holding()
    next(generator)
    assert ran() == "sdpa_math"
    thread = threading.Thread(target=generator.close)
    thread.start()
    thread.join()
    assert ran() == "torch_sdpa"
    assert model_calls._context.get() is None


def test_another_thread_sees_nothing() -> None:
    seen: list[str] = []
    with force_backend("sdpa_math"):
        thread = threading.Thread(target=lambda: seen.append(ran()))
        thread.start()
        thread.join()
        assert ran() == "sdpa_math"
    assert seen == ["torch_sdpa"]


def test_tasks_do_not_disturb_one_another() -> None:
    async def task(backend: str) -> list[str]:
        with attention_backend(backend):
            seen = [ran()]
            await asyncio.sleep(0)
            seen.append(ran())
            await asyncio.sleep(0)
            return [*seen, ran()]

    async def all_of_them() -> list[list[str]]:
        with attention_backend("reference"):
            found = await asyncio.gather(*(task(name) for name in ("sdpa_math", "native", "emulated_int8")))
            assert ran() == "reference"
            return found

    assert asyncio.run(all_of_them()) == [["sdpa_math"] * 3, ["torch_sdpa"] * 3, ["emulated_int8"] * 3]


def test_a_block_ends_in_the_tasks_and_threads_that_were_handed_it() -> None:
    async def later(left: asyncio.Event) -> list[str]:
        seen = [await asyncio.to_thread(ran)]
        await left.wait()
        return [*seen, ran(), await asyncio.to_thread(ran)]

    async def run() -> list[str]:
        left = asyncio.Event()
        with attention_backend("sdpa_math"):
            task = asyncio.create_task(later(left))
            await asyncio.sleep(0.05)
        left.set()
        return await task

    assert asyncio.run(run()) == ["sdpa_math", "torch_sdpa", "torch_sdpa"]


def test_no_setting_of_torch_is_touched() -> None:
    def settings() -> list[object]:
        cuda = torch.backends.cuda
        flags = [cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.math_sdp_enabled, cuda.cudnn_sdp_enabled]
        return [*(flag() for flag in flags), sdpa is torch.nn.functional.scaled_dot_product_attention]

    before = settings()
    with force_backend("sdpa_math"), checks(), account():
        attention(Q, K, V)
        assert settings() == before
    assert settings() == before
