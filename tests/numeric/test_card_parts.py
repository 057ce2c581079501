"""The parts of `card` that measure: they run here at a small size, and its page can be made of their results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import fakes  # noqa: E402
from attention_backends.backends.doctor import probe  # noqa: E402
from attention_backends.backends.engine.router import Router  # noqa: E402
from attention_backends.backends.kernels import BACKENDS  # noqa: E402
from attention_backends.backends.kernels.registry import detect  # noqa: E402
from attention_backends.backends.kernels.support.sdpa import plain_sdpa  # noqa: E402
from attention_backends.backends.measure.remembered import Outcome  # noqa: E402
from attention_backends.backends.values.platform import parse_platform  # noqa: E402
from attention_backends.backends.values.request import AttentionCall  # noqa: E402
from attention_backends.comparison import bench_inputs, bench_run  # noqa: E402
from attention_backends.comparison.card import costs, parts, store  # noqa: E402
from attention_backends.comparison.card import work as card_work  # noqa: E402
from attention_backends.comparison.card.page import page  # noqa: E402
from attention_backends.comparison.card.work import Skipped, Work  # noqa: E402
from fakes import machine  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a part gets, by its name; two small presets, two forms of masks and two backends are all there is."""
    monkeypatch.setattr(parts, "PRESETS", ["ltx2_audio", "z_image"])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(parts, "CPU_TOKENS", 32)
    varied = [changes for changes in parts.VARIED if not changes or {"mask", "is_causal", "scale"} & set(changes)]
    monkeypatch.setattr(parts, "VARIED", varied)
    monkeypatch.setattr(parts, "MASK_TOKENS", {"cpu": 64})
    monkeypatch.setattr(parts, "GUARD_TOKENS", 64)
    file = tmp_path / store.RUNNING
    facts = {"kind": store.KIND, "format": store.FORMAT, "command": "card", "minutes": 1.0, "started": "now"}
    lost = {name: "left out" for name in ("sdpa_flash", "flex_attn", "reference", "emulated_int8")}
    store.write(file, {**facts, "state": "running", "parts": {"doctor": {"lost": lost}}})
    return lambda name, seconds=60.0: Work(name, file, seconds)


def ran(work: Work) -> dict[str, Any]:
    """The results of a part, once they are in the file; the page can be made of them."""
    parts.PARTS[work.name](work)
    work.keep("ok")
    data = json.loads(work.file.read_text(encoding="utf-8"))
    assert page(data) == work.file.with_suffix(".md").read_text(encoding="utf-8")
    results: dict[str, Any] = data["parts"][work.name]["results"]
    return results


def test_numerics_of_every_kernel_that_runs_and_did_not_crash(work: Any) -> None:
    results = ran(work("numerics"))
    assert set(results) == {"torch_sdpa", "sdpa_math"}
    for row in results.values():
        assert 0 < row["worst_relative_l2"] < row["limit"]
        assert (row["calls"], row["wrong"]) == (3 * len(parts.VARIED), [])


def test_a_wrong_kernel_is_wrong_in_the_calls_that_show_it(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(call: AttentionCall) -> torch.Tensor:
        mask = call.attn_mask
        if mask is not None and mask.dtype != torch.bool:  # hides the same keys and drops the numbers of the others
            mask = mask.isfinite()
        return plain_sdpa()(call.changed(scale=None, attn_mask=mask))

    monkeypatch.setattr(Router, "kernel", lambda self, name: wrong)
    found = ran(work("numerics"))["torch_sdpa"]["wrong"]
    assert len(found) == 6
    assert sum("scale 0.05" in text for text in found) == sum("mask bias" in text for text in found) == 3


def test_the_doctor_has_a_row_for_each_backend_and_its_probe(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTENTION_BACKENDS_CACHE", str(work("doctor").file.parent))
    asked: list[float] = []

    def answer(name: str, timeout: float) -> Outcome:
        asked.append(timeout)
        return Outcome("hung" if name == "sdpa_math" else "ok", relative_l2=0.001, ms=1.0)

    monkeypatch.setattr(probe, "probe", answer)
    results = ran(work("doctor"))
    assert set(results) == set(BACKENDS) - set(work("x").lost)
    assert {name: results[name]["probed"]["status"] for name in ("torch_sdpa", "sdpa_math", "comfy")} == {
        "torch_sdpa": "ok", "sdpa_math": "hung", "comfy": "untested",
    }  # fmt: skip
    assert max(asked) <= 30.0, "half of the time, so that a probe that hangs is known as such"


def test_presets_end_when_their_time_is_over_and_go_on_later(work: Any) -> None:
    first = work("presets", 0.0)
    assert ran(first) == {}
    assert first.not_reached == ["ltx2_audio", "z_image"]
    results = ran(work("presets"))
    assert [case["name"] for case in results["z_image"]["cases"]] == ["z_image, no mask", "z_image, masked"]
    for report in results.values():
        assert [row["backend"] for row in report["cases"][0]["rows"] if row["rank"]]


def test_masks_overhead_and_guard(work: Any) -> None:
    found = ran(work("masks"))
    assert set(found) == set(costs.mask_forms(64))
    assert all(each["same"] is True or each["same"] < 1e-5 for each in found.values())
    with torch.inference_mode():
        assert costs.call_cost(CPU, rounds=3, calls=3)["sdpa_us"] > 0
    found = ran(work("guard"))
    assert found["synchronisations"] == "skipped: no CUDA device"
    assert found["cost"]["checks_of_20_calls"] > 0
    assert all(math.isfinite(value) for value in found["cost"].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_what_needs_a_gpu_is_skipped_with_its_reason(work: Any) -> None:
    with pytest.raises(Skipped, match="no CUDA device"):
        parts.hunyuan_cudnn(work("hunyuan_cudnn"))


@pytest.mark.parametrize("part", ["numerics", "presets"])
def test_where_every_backend_was_lost_none_runs(work: Any, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    monkeypatch.setattr(bench_run, "measure", lambda *args, **options: pytest.fail("ran"))
    given = work(part)
    given.lost = dict.fromkeys(BACKENDS, "crashed")
    with pytest.raises(Skipped, match=parts.ALL_LOST):
        parts.PARTS[part](given)
    assert not given.results


def test_pictures_need_what_they_are_compared_with(work: Any) -> None:
    given = work("pictures")
    given.lost["torch_sdpa"] = "crashed"
    with pytest.raises(Skipped, match="torch_sdpa was lost"):
        parts.pictures(given)


@pytest.mark.parametrize(
    ("lost", "ran_there", "ended"),
    [
        ([], ["cudnn_attn", "torch_sdpa"], None),
        ([], ["torch_sdpa"], "key_padding, bias: one of the two"),
        (["cudnn_attn"], None, "key_padding, bias: cudnn_attn was lost before: crashed"),
        (["torch_sdpa"], None, "key_padding, bias: torch_sdpa was lost before: crashed"),
    ],
)
def test_a_comparison_needs_both_sides(
    work: Any, monkeypatch: pytest.MonkeyPatch, lost: list[str], ran_there: list[str] | None, ended: str | None
) -> None:
    def bench(*_: Any) -> dict[str, Any]:
        assert ran_there is not None
        rows = [{"backend": name, "rank": int(name in ran_there)} for name in ("cudnn_attn", "torch_sdpa")]
        return {"cases": [{"rows": rows}]}

    monkeypatch.setattr(parts, "detect", lambda: parse_platform("cuda:9.0"))
    monkeypatch.setattr(parts, "_bench", bench)
    given = work("hunyuan_cudnn")
    monkeypatch.setattr(given, "keep", lambda: None)  # the page needs whole reports
    given.lost.update(dict.fromkeys(lost, "crashed"))
    if ended is None:
        parts.hunyuan_cudnn(given)
    else:
        with pytest.raises(Skipped, match=ended):
            parts.hunyuan_cudnn(given)
    assert set(given.results) == (set() if lost else {"key_padding", "bias"})


def test_the_machine_is_known_by_its_card_and_versions(work: Any) -> None:
    found = ran(work("machine"))
    assert found["device"] == detect().kind
    assert found["versions"]["torch"] == torch.__version__


def test_a_step_that_would_take_longer_than_there_is_time_is_not_begun(
    work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(card_work.time, "monotonic", lambda: now[0])
    given = work("presets", 20.0)
    over = []
    for passed in (0.0, 8.0, 1.0, 4.0):
        now[0] += passed
        over.append(given.is_over())
    assert over == [False, False, False, True]


@pytest.mark.parametrize("drops_scale", [False, True])
def test_numerics_of_a_cards_kernels_by_their_fakes(
    work: Any, monkeypatch: pytest.MonkeyPatch, drops_scale: bool
) -> None:
    router = machine(monkeypatch, "flash-attn==2.8.3 sageattention==2.2.0 triton==3.6.0")
    monkeypatch.setattr(parts, "detect", lambda: router.platform)
    monkeypatch.setattr(bench_inputs, "device_of", lambda platform: CPU)
    imitated = ("flash_attn_2", "sage_fp16_triton", "sage_fp8_cuda")
    kernels = parts._kernels
    monkeypatch.setattr(parts, "_kernels", lambda *given: [name for name in kernels(*given) if name in imitated])
    if drops_scale:
        attend = fakes.flash_attn_2.flash_attn_func
        wrong = lambda *given, **more: attend(*given, **{**more, "softmax_scale": None})  # noqa: E731
        monkeypatch.setattr(fakes.flash_attn_2, "flash_attn_func", wrong)
    results = ran(work("numerics"))
    assert set(results) == set(imitated)
    assert all(row["calls"] > 0 for row in results.values())
    assert [name for name, row in results.items() if row["wrong"]] == (["flash_attn_2"] if drops_scale else [])
