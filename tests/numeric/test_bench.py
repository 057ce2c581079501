"""The kernel benchmark: what it measures, what becomes of a kernel that fails, and what it writes."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

torch = pytest.importorskip("torch", reason="torch is not installed")

import broken_backends as broken  # noqa: E402
from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.backends.kernels.reference import reference_attention  # noqa: E402
from attention_backends.backends.kernels.registry import detect  # noqa: E402
from attention_backends.backends.kernels.support.sdpa import plain_sdpa  # noqa: E402
from attention_backends.backends.kernels.support.workspace import lacking_memory  # noqa: E402
from attention_backends.backends.measure import device_clock, error  # noqa: E402
from attention_backends.backends.measure.error import exact_rows  # noqa: E402
from attention_backends.backends.values.grid import TokenGrid  # noqa: E402
from attention_backends.backends.values.limits import NO_MASK, Dtypes  # noqa: E402
from attention_backends.backends.values.platform import Platform  # noqa: E402
from attention_backends.backends.values.request import AttentionCall, AttentionRequest  # noqa: E402
from attention_backends.cli import main  # noqa: E402
from attention_backends.comparison import (  # noqa: E402
    bench,
    bench_command,
    bench_inputs,
    bench_report,
    bench_run,
    bench_tables,
)
from attention_backends.comparison.bench import Case, make_cases, run_cases  # noqa: E402
from attention_backends.comparison.bench_inputs import make_inputs  # noqa: E402
from attention_backends.comparison.bench_run import Asked, choose_backends, measure  # noqa: E402
from attention_backends.comparison.presets import GRIDS, PRESETS, Preset, parse_presets  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SMALL = AttentionRequest(1, 2, 48, 48, 16, "float32", 2, 16, "key_padding")


def run(router: Router, *backends: str, request: AttentionRequest = SMALL, **more: Any) -> tuple[Case, str | None]:
    case = Case("small", request, hidden=8)
    ended = run_cases([case], backends, router, CPU, **more)
    return case, ended


def statuses(case: Case) -> dict[str, str]:
    return {row.backend: row.status for row in case.rows}


class Spying:
    """PyTorch's attention that keeps what it was called with."""

    def __init__(self, then: Callable[[AttentionCall], None] = lambda call: None) -> None:
        self.calls: list[int] = []
        self.then = then

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        self.calls.append(call.query.data_ptr())
        output = plain_sdpa()(call)
        self.then(call)
        return output


# The shapes


def test_the_seeds_and_the_real_shapes_are_exact() -> None:
    shapes = {name: (p.batch, p.num_heads, p.q_len, p.kv_len, p.head_dim, p.padded) for name, p in PRESETS.items()}
    assert shapes == {
        "hv15": (1, 24, 14336, 14336, 128, 256),
        "wan22": (1, 40, 16384, 16384, 128, 256),
        "flux": (1, 24, 4096, 4096, 128, 256),
        "hunyuan_video_15": (1, 16, 14296, 14296, 128, 256),
        "wan22_14b_self": (1, 40, 14040, 14040, 128, 0),
        "wan22_14b_cross": (1, 40, 14040, 512, 128, 0),
        "flux2": (1, 48, 4608, 4608, 128, 512),
        "z_image": (1, 30, 4352, 4352, 128, 256),
        "qwen_image": (1, 24, 64 * 64 + 15, 64 * 64 + 15, 128, 0),
        "ltx2_video": (1, 32, 5070, 5070, 128, 0),
        "ltx2_audio": (1, 32, 100, 100, 64, 0),
        "ltx2_audio_to_video": (1, 32, 5070, 100, 64, 0),
    }
    assert all(preset.source for preset in PRESETS.values())


def test_scaling_keeps_proportions_and_never_stretches() -> None:
    hv15, cross, audio = (PRESETS[name].scaled(1024) for name in ("hv15", "wan22_14b_cross", "ltx2_audio"))
    assert (hv15.q_len, hv15.kv_len, hv15.padded, hv15.full) == (1024, 1024, 18, (14336, 14336, 256))
    assert (cross.q_len, cross.kv_len, cross.padded) == (1024, 37, 0)
    assert audio is PRESETS["ltx2_audio"]
    assert PRESETS["hv15"].scaled(0) is PRESETS["hv15"]
    tiny = PRESETS["flux2"].scaled(2)
    assert 0 < tiny.padded < tiny.kv_len, "a key stays visible"


def test_a_model_without_padding_has_no_masked_case_and_says_so(snapshot: SnapshotAssertion) -> None:
    cases, notes = make_cases(parse_presets("flux,wan22_14b_self"), "bfloat16", "both", "bias")
    assert [(case.name, case.request.mask, case.hidden) for case in cases] == [
        ("flux, no mask", "none", 0),
        ("flux, masked", "bias", 256),
        ("wan22_14b_self, no mask", "none", 0),
    ]
    assert notes == snapshot


# The inputs and the yardstick


@pytest.mark.parametrize("kind", ["none", "key_padding", "bool", "bias"])
def test_the_checked_rows_are_those_of_the_whole_result(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    request = SMALL._replace(q_len=40, num_heads=4, num_kv_heads=2, mask=kind)
    call = make_inputs(request, 8, CPU, 3, 13)[0]
    wide = AttentionCall(call.query.double(), call.key.double(), call.value.double(), call.attn_mask, enable_gqa=True)
    seen: list[int] = []

    def watched(part: AttentionCall) -> torch.Tensor:
        seen.append(part.query.shape[1] * part.query.shape[2] * part.key.shape[2])
        return reference_attention(part)

    monkeypatch.setattr(error, "reference_attention", watched)
    rows, exact = exact_rows(call, 7)
    assert rows.tolist() == [0, 6, 13, 20, 26, 32, 39]
    torch.testing.assert_close(exact, reference_attention(wide)[:, :, rows], rtol=0, atol=1e-15)
    assert max(seen) == 7 * 48, "one head of the drawn rows at a time, never all scores"
    assert call.request().mask == kind


def test_a_mask_hides_the_last_keys_and_only_those() -> None:
    for kind, shape in (("key_padding", (1, 1, 1, 48)), ("bool", (1, 1, 48, 48)), ("bias", (1, 1, 48, 48))):
        mask = make_inputs(SMALL._replace(mask=kind), 8, CPU, 0, 13)[0].attn_mask
        assert mask is not None
        assert mask.shape == shape
        visible = mask if kind != "bias" else mask == 0
        assert visible[..., :40].all()
        assert not visible[..., 40:].any()
        assert kind != "bias" or torch.isinf(mask[..., 40:]).all()


def test_a_seed_means_the_same_numbers_and_sets_differ() -> None:
    one, again, other = (make_inputs(SMALL, 8, CPU, seed, 13) for seed in (1, 1, 2))
    assert len(one) == 13, "small inputs: one set for every call"
    assert torch.equal(one[0].key, again[0].key)
    assert not torch.equal(one[0].key, other[0].key)
    assert not any(torch.equal(one[0].query, call.query) for call in one[1:])
    assert len({call.key.data_ptr() for call in one}) == 13


def test_sets_go_beyond_any_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 3 * 2 * 48 * 16 * 4
    monkeypatch.setattr(bench_inputs, "LARGEST_CACHE", 3 * size - 1)
    assert len(make_inputs(SMALL, 8, CPU, 0, 13)) == 3
    monkeypatch.setattr(bench_inputs, "LARGEST_CACHE", 1)
    assert len(make_inputs(SMALL, 8, CPU, 0, 13)) == 2


# The protocol


def test_thirteen_calls_each_with_other_tensors_than_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []
    spy = Spying()
    monkeypatch.setattr(device_clock, "synchronise", lambda device: waits.append(len(spy.calls)))
    monkeypatch.setattr(bench_inputs, "LARGEST_CACHE", 1)
    case, ended = run(broken.router(broken.Wrong("aiter", spy)), "aiter")
    assert ended is None
    assert len(spy.calls) == 13
    assert all(one != other for one, other in zip(spy.calls, spy.calls[1:], strict=False))
    assert waits == [number for call in range(13) for number in (call, call + 1)], "before and after each call"
    (row,) = case.rows
    assert row.low is not None
    assert row.high is not None
    assert row.ms is not None
    assert row.low <= row.ms <= row.high
    assert row.peak_bytes is None


def test_the_median_is_that_of_the_ten_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    took = iter([9.0, 9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.5, 10.0])
    now = [0.0]
    wait = Spying(lambda call: now.__setitem__(0, now[0] + next(took)))
    monkeypatch.setattr(device_clock, "perf_counter_ns", lambda: 1e9 * now[0])
    case, _ = run(broken.router(broken.Wrong("aiter", wait)), "aiter")
    assert (case.rows[0].ms, case.rows[0].low, case.rows[0].high) == (5500.0, 1000.0, 10000.0)


def test_memory_is_the_kernels_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA: the most beyond what there was before, without what checking the first output took."""
    spy, resets = Spying(), []
    monkeypatch.setattr(device_clock, "synchronise", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 170)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: resets.append(len(spy.calls)))
    problem = bench_inputs.Problem(calls := make_inputs(SMALL, 8, CPU, 0, 13), *exact_rows(calls[0], 7))
    row = bench.KernelResult("aiter", "exact")
    bench._measure(row, {}, SMALL, broken.router(broken.Wrong("aiter", spy)), problem, torch.device("cuda"))
    assert row.peak_bytes == 120
    assert resets == [1]


@pytest.mark.gpu
def test_on_a_card() -> None:
    report = measure(Asked("hv15", tokens=2048), Router(detect()))
    assert report.ended is None
    for case in report.cases:
        sdpa = case.row("torch_sdpa")
        assert sdpa is not None
        assert sdpa.status == "ok"
        assert sdpa.relative_l2 < 0.01
        assert sdpa.peak_bytes >= 24 * 2048 * 128 * 2, "the output at least"


def test_errors_are_told_from_rounding() -> None:
    router = broken.router(
        broken.Wrong(broken.WRONG_SCALE, broken.wrong_scale), broken.Wrong(broken.DROPPED_MASK, broken.dropped_mask)
    )
    backends = ("torch_sdpa", "sdpa_math", "emulated_int8", broken.WRONG_SCALE, broken.DROPPED_MASK)
    case, _ = run(router, *backends)
    said = {row.backend: bench_report.result(row, case) for row in case.rows}
    assert said["torch_sdpa"] == "ok"
    assert said["sdpa_math"] == "rounding only"
    assert said["emulated_int8"].startswith("error ")
    assert not said["emulated_int8"].endswith("declared exact")
    for name in (broken.WRONG_SCALE, broken.DROPPED_MASK):
        assert said[name].endswith("declared exact"), said[name]
    cosines = {row.backend: row.cosine for row in case.rows}
    assert cosines["torch_sdpa"] > 1 - 1e-9
    assert cosines[broken.DROPPED_MASK] < 0.999


# What cannot run


def test_what_cannot_run_is_refused_before_the_kernel_is_called(snapshot: SnapshotAssertion) -> None:
    spy = Spying()
    limited = broken.Wrong("aiter", spy)
    limited.limits = limited.limits.__class__(Dtypes(("float32",)), NO_MASK)  # type: ignore[misc]
    case, ended = run(broken.router(limited), "cudnn_attn", "aiter", "comfy", "torch_sdpa")
    assert ended is None
    said = statuses(case)
    assert said.pop("comfy") == bench.OUTSIDE_COMFYUI
    assert said.pop("torch_sdpa") == "ok"
    assert said == snapshot
    assert spy.calls == []


def test_failures_are_rows_and_the_rest_goes_on(snapshot: SnapshotAssertion) -> None:
    router = broken.router(
        broken.Wrong(broken.RAISING, broken.failing_after(5, lambda: ValueError("as it\nshould"))),
        broken.Wrong(broken.MEMORY, broken.failing_after(0, broken.no_memory)),
        broken.Wrong(broken.NAN, lambda call: plain_sdpa()(call) * float("nan")),
        broken.Wrong("flex_attn", lambda call: plain_sdpa()(call)[:, :, :, :3]),
    )
    case, ended = run(router, broken.RAISING, broken.MEMORY, broken.NAN, "flex_attn", "torch_sdpa")
    said = statuses(case)
    assert ended is None
    assert said[broken.RAISING] == snapshot
    assert said[broken.MEMORY].startswith("out of memory: ")
    assert said[broken.NAN] == snapshot
    assert said["flex_attn"] == snapshot
    assert said["torch_sdpa"] == "ok"
    assert [row.backend for row in bench_report.ranking(case)] == ["torch_sdpa"]


def test_a_preset_that_does_not_fit_is_rows_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    made = bench.make_inputs

    def too_large(request: AttentionRequest, *rest: Any) -> list[AttentionCall]:
        if request.q_len == 64:
            raise broken.no_memory()
        return made(request, *rest)

    monkeypatch.setattr(bench, "make_inputs", too_large)
    cases = [Case("large", SMALL._replace(q_len=64), 8), Case("small", SMALL, 8)]
    assert run_cases(cases, ["torch_sdpa", "cudnn_attn"], broken.router(), CPU) is None
    assert cases[0].rows[0].status == snapshot
    assert cases[0].rows[1].status == snapshot
    assert statuses(cases[1])["torch_sdpa"] == "ok"


def test_a_fault_ends_the_run_and_keeps_what_was_finished(snapshot: SnapshotAssertion) -> None:
    spy = Spying()
    router = broken.router(
        broken.Wrong(broken.FAULT, broken.failing_after(4, broken.fault)), broken.Wrong("aiter", spy)
    )
    cases = [Case("one", SMALL, 8), Case("two", SMALL, 8)]
    ended = run_cases(cases, ["torch_sdpa", broken.FAULT, "aiter"], router, CPU)
    assert ended is not None
    assert ended == snapshot
    assert [row.backend for row in cases[0].rows] == ["torch_sdpa", broken.FAULT]
    assert cases[0].rows[0].ms is not None
    assert cases[1].rows == []
    assert spy.calls == [], "nothing more is asked of a device in that state"


def test_a_device_that_complains_again_does_not_hide_the_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def leaving_fails() -> Iterator[None]:
        yield
        raise broken.fault()

    monkeypatch.setattr(bench, "nullcontext", leaving_fails)
    router = broken.router(broken.Wrong(broken.FAULT, broken.failing_after(0, broken.fault)))
    case, ended = run(router, "torch_sdpa", broken.FAULT)
    assert ended is not None
    assert ended.startswith(f"{broken.FAULT} left the GPU unusable")
    assert case.rows[0].status == "ok"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(router, "torch_sdpa")


def test_an_interruption_keeps_what_was_finished() -> None:
    def stop(call: AttentionCall) -> torch.Tensor:
        raise KeyboardInterrupt

    case, ended = run(broken.router(broken.Wrong("aiter", stop)), "torch_sdpa", "aiter", "sdpa_math")
    assert ended == bench.INTERRUPTED
    assert statuses(case) == {"torch_sdpa": "ok"}


def test_what_the_host_would_run_is_really_called() -> None:
    spy = Spying()
    case, _ = run(broken.router(), "comfy", host=spy, host_name="their_attention")
    assert len(spy.calls) == 13
    assert (case.rows[0].status, case.rows[0].member) == ("ok", "their_attention")


@pytest.mark.skipif(not Path("/proc/meminfo").is_file(), reason="only Linux says how much memory is free")
def test_scores_beyond_the_memory_of_a_computer_are_refused(snapshot: SnapshotAssertion) -> None:
    huge = PRESETS["wan22"].request("bfloat16")._replace(batch=10_000)
    case, _ = run(broken.router(), "sdpa_math", request=huge)
    needed, above, _ = case.rows[0].status.partition(" > ")
    assert above
    assert needed == snapshot
    assert lacking_memory(BACKENDS["torch_sdpa"], huge, Platform("cpu")) is None
    assert lacking_memory(BACKENDS["sdpa_math"], SMALL, Platform("cpu")) is None


def test_without_names_all_that_run_here_are_taken() -> None:
    chosen = choose_backends("", broken.router())
    assert chosen[:2] == ["torch_sdpa", "cudnn_attn"]
    assert chosen[-1] == "comfy"
    assert {"sdpa_flash", "sdpa_math"} <= set(chosen)
    assert not {"reference", "emulated_int8", "flash_attn_2"} & set(chosen)


# The report


def timed(backend: str, ms: float, half_width: float = 0.1) -> bench.KernelResult:
    low, high = ms - half_width, ms + half_width
    return bench.KernelResult(backend, "exact", "ok", ms, low, high, 1e-3, 0.9999999, 2_000_000)


def test_ratios_ranks_and_blanks(snapshot: SnapshotAssertion) -> None:
    case = Case("hv15, no mask", SMALL)
    refused = bench.KernelResult("flash_attn_2", "exact", "head_dim 300 > 256")
    case.rows = [timed("torch_sdpa", 10.0), timed("cudnn_attn", 5.0), refused, timed("sdpa_math", 10.05)]
    lines = {line[1]: dict(zip(bench_tables.COLUMNS, line, strict=True)) for line in bench_tables.cells(case)}
    assert [line[1] for line in bench_tables.cells(case)] == [
        "backend", "cudnn_attn", "torch_sdpa", "sdpa_math", "flash_attn_2",
    ]  # fmt: skip
    assert (lines["cudnn_attn"]["vs SDPA"], lines["cudnn_attn"]["vs cuDNN"]) == ("2.00x", "1.00x")
    assert (lines["sdpa_math"]["vs SDPA"], lines["sdpa_math"]["vs cuDNN"]) == ("~1.00x", "0.50x")
    assert lines["flash_attn_2"] == {**dict.fromkeys(bench_tables.COLUMNS, "-"), "backend": "flash_attn_2",
                                     "result": "head_dim 300 > 256"}  # fmt: skip
    assert lines["cudnn_attn"]["peak MB"] == "2.0"
    assert bench_report.blanks(case) == []
    assert bench_tables.rank_line(case) == snapshot
    case.rows[1] = bench.KernelResult("cudnn_attn", "exact", "cuDNN 90100 < 90500")
    assert bench_report.blanks(case) == snapshot
    assert {line[6] for line in bench_tables.cells(case)[1:]} == {"-"}


def test_a_report_says_what_was_scaled_and_what_was_not_counted(snapshot: SnapshotAssertion) -> None:
    asked = Asked("hv15", "torch_sdpa", "masked", "bias", "fp32", tokens=64)
    report = measure(asked, broken.router())
    text = bench_tables.console(report)
    lines = text.splitlines()
    assert next(line for line in lines if line.startswith("hv15, masked (HunyuanVideo 1.5): batch ")) == snapshot
    assert [line for line in lines if line.startswith("Note: ")] == snapshot
    data = json.loads(report.to_json(), parse_constant=lambda text: pytest.fail(text))
    (case,) = data["cases"]
    assert case["request"]["mask"] == "bias"
    assert case["preset"]["full"] == [14336, 14336, 256]
    assert case["rows"][0]["rank"] == 1
    assert data["protocol"] == {"warm_up": 3, "timed": 10, "reference": "float64"}


def test_the_device_that_was_asked_for_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(bench_run, "run_cases", lambda cases, backends, router, device, **more: ran.append(device))
    measure(Asked("ltx2_audio"), broken.router(), torch.device("cuda:1"))
    measure(Asked("ltx2_audio"), broken.router())
    assert ran == [torch.device("cuda:1"), CPU]


@pytest.mark.parametrize(
    "wrong",
    [
        {"presets": "hv16"},
        {"dtype": "int8"},
        {"masks": "some"},
        {"mask_kind": "causal"},
        {"tokens": -1},
        {"backends": "sgae"},
        {"backends": "auto"},
        {"presets": "ltx2_audio", "masks": "masked"},
    ],
)
def test_what_makes_no_sense_is_refused_with_a_sentence(wrong: dict[str, Any], snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ValueError) as caught:
        measure(Asked(**{"tokens": 16, **wrong}), broken.router())
    said, _, names = str(caught.value).partition(" are: ")
    assert said == snapshot
    assert not names or {"hv15", "torch_sdpa"} & set(names.split(", "))


# The command


def test_the_command_writes_chart_data_and_report(tmp_path: Path) -> None:
    wanted = ["--presets", "flux,ltx2_audio", "--backends", "sdpa_flash,cudnn,comfy", "--tokens", "64"]
    command = [sys.executable, str(ROOT), "bench", *wanted, "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "attention_benchmark"
    assert sorted(path.name for path in folder.iterdir()) == sorted(bench_command.FILES)
    assert (folder / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))
    assert [case["name"] for case in data["cases"]] == ["flux, no mask", "flux, masked", "ltx2_audio, no mask"]
    assert data["cases"][0]["rows"][-1]["status"] == bench.OUTSIDE_COMFYUI
    page = (folder / "benchmark.md").read_text(encoding="utf-8")
    for text in (done.stdout, page):
        assert "Ranking, fastest first" in text
        assert "flux, masked: " in text
        assert "down to 64 tokens" in text
        assert text.isascii()
    assert data["command"] in page
    assert shlex.split(data["command"])[-6:] == ["--tokens", "64", "--seed", "0", "--device", "cpu"]


@pytest.mark.parametrize(("flag", "kinds"), [("--masked", ["key_padding"]), ("--unmasked", ["none"])])
def test_masked_and_unmasked_alone(
    flag: str, kinds: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--presets", "flux", "--backends", "sdpa_math", "--tokens", "32", "--device", "cpu", flag, "--json"]
    assert main(["bench", *arguments, "--output", str(tmp_path / "out")]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [case["request"]["mask"] for case in data["cases"]] == kinds
    assert [row["backend"] for row in data["cases"][0]["rows"]] == ["torch_sdpa", "sdpa_math"]


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (broken.fault, 1)])
def test_an_early_end_writes_what_was_finished(
    error: Callable[[], BaseException], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    right = bench._measure

    def measured(row: Any, *rest: Any) -> None:
        if row.backend == "sdpa_math":
            raise error()
        right(row, *rest)

    monkeypatch.setattr(bench, "_measure", measured)
    arguments = ["--presets", "flux", "--backends", "sdpa_math", "--tokens", "32", "--device", "cpu"]
    assert main(["bench", *arguments, "--output", str(tmp_path)]) == status
    assert "ended early: " in capsys.readouterr().out
    data = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))
    assert data["ended"]
    assert data["cases"][0]["rows"][0]["status"] == "ok"
    assert (tmp_path / "benchmark.png").exists()


def test_bad_input_ends_with_2_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, words in ((["--presets", "hv16"], "no preset"), (["--backends", ""], "no backends chosen")):
        assert main(["bench", *wrong, "--tokens", "16", "--output", str(tmp_path / "out")]) == 2
        assert words in capsys.readouterr().err
        assert not list(tmp_path.glob("out/*"))


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['x', 'bench', '--help'];"
        f"runpy.run_path({str(ROOT)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--presets" in done.stdout
    assert "ltx2_audio_to_video" in done.stdout


def test_what_is_left_out_without_a_name_is_said(
    capsys: pytest.CaptureFixture[str], snapshot: SnapshotAssertion
) -> None:
    from attention_backends.backends.engine.router import Router
    from attention_backends.backends.values.platform import Platform
    from attention_backends.comparison import bench_command, bench_run

    packages = (("flash-attn", "2.8.3"), ("triton", "3.6.0"))
    router = Router(Platform("cuda", capability=(8, 6), torch="2.11.0", cudnn=91002, packages=packages, described=True))
    chosen = bench_run.choose_backends("", router)
    assert not set(bench_command.ONLY_NAMED) & set(chosen)
    (absent, unasked) = bench_run._not_here(chosen, router, "")
    assert unasked.partition(": ")[0] == snapshot
    assert set(unasked.partition(": ")[2].split(", ")) == set(bench_command.ONLY_NAMED)
    assert not set(bench_command.ONLY_NAMED) & set(absent.partition(": ")[2].split(", "))
    assert bench_run._not_here(chosen, router, "flash_attn") == []
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f" but {', '.join(bench_command.ONLY_NAMED)}" in said


def test_presets_with_a_grid_are_scaled_as_a_grid_and_named_apart() -> None:
    assert parse_presets("grids") == list(GRIDS.values())
    assert not set(GRIDS) & set(PRESETS)
    assert not {preset.name for preset in parse_presets("all")} & set(GRIDS)
    for preset in GRIDS.values():
        assert preset.grid is not None
        assert preset.q_len == preset.kv_len == preset.grid.tokens
        for tokens in (1, 777, 4096):
            small = preset.scaled(tokens)
            assert small.request("float32").grid == small.grid is not None
            assert small.q_len == small.grid.tokens
            assert small.q_len <= max(tokens, 1 + small.grid.before)
        assert preset.scaled(4096).q_len > 2500
    assert GRIDS["wan22_480p"].scaled(4096).grid == TokenGrid(10, 15, 26)


def test_a_case_with_a_grid_has_a_row_for_each_sparse_method_and_share() -> None:
    grid = TokenGrid(5, 16, 16, before=20)
    preset = Preset("video", "Video", 2, grid.tokens, grid.tokens, "here", head_dim=16, grid=grid)
    cases, _ = make_cases([preset, PRESETS["ltx2_audio"].scaled(16)], "float32", "unmasked", "bool")
    sparse = ["video_sparse_attn", "nabla_attn"]
    assert run_cases(cases, ["torch_sdpa", "sparge_attn"], Router(detect(CPU)), CPU, sparse=sparse) is None
    with_grid, without = cases
    rows = {row.label: row for row in with_grid.rows}
    assert {label: row.status for label, row in rows.items()} == dict.fromkeys(rows, "ok")
    assert [label.partition(" ")[0] for label in rows] == [
        "torch_sdpa", *["sparge_attn"] * 3, *["video_sparse_attn"] * 3, "nabla_attn",
    ]  # fmt: skip
    assert rows["torch_sdpa"].kept is None
    shares = [rows[f"video_sparse_attn sparsity={sparsity}"].kept for sparsity in (0.5, 0.75, 0.875)]
    assert all(kept is not None and abs(kept - share) < 0.12 for kept, share in zip(shares, bench.SHARES, strict=True))
    errors = [rows[f"sparge_attn topk={share:g}"].relative_l2 or 0.0 for share in bench.SHARES]
    assert 0.01 < errors[0] < errors[1] < errors[2]
    assert [(row.backend, row.kept) for row in without.rows][1] == ("sparge_attn", None)
    assert without.rows[1].status != "ok", "no token grid"
    table = bench_tables.cells(with_grid)
    assert table[0][-1] == bench_tables.KEPT
    assert bench_tables.cells(without)[0] == list(bench_tables.COLUMNS)
    assert all(len(line) == len(table[0]) for line in table)
