"""The picture: every row has its panel, differences and NaN show in their colours, odd input does not break it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from attention_backends.comparison import metrics
from attention_backends.comparison.bench import KernelResult, make_cases
from attention_backends.comparison.bench_chart import draw_benchmark
from attention_backends.comparison.bench_report import BenchReport
from attention_backends.comparison.picture import SCALE, draw, draw_pictures, save, to_tensor
from attention_backends.comparison.presets import PRESETS
from attention_backends.comparison.report import CallScore, Report, Row, Spread
from picture_texts import LABEL, check_readable, says
from syrupy.assertion import SnapshotAssertion

NO_GPU = "needs an NVIDIA GPU (this is a CPU)"
TIME = Spread(10.0, 9.0, 12.0, 3)


def report(*rows: Row, mode: str = "end_to_end", frames: int = 1, prompt: str = "a red star") -> Report:
    return Report(mode, "model", prompt, 7, 32, 32, frames, 20, 4.0, "euler", "float32", "a machine",
                  {"torch": "2"}, rows=list(rows))  # fmt: skip


def picture(frames: int = 1, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.full((frames, height, width, 3), 0.5)


def drawn(rows: list[Row], pictures: list[torch.Tensor | None], **changes: object) -> tuple[str, torch.Tensor]:
    """All words of the figure, and its pixels."""
    for row, image in zip(rows, pictures, strict=True):
        if image is not None and pictures[0] is not None:
            metrics.score(row, image, pictures[0])
    figure = draw_pictures(report(*rows, **changes), pictures)  # type: ignore[arg-type]
    words = [text.get_text() for text in figure.texts]
    words += [text.get_text() for axes in figure.axes for text in axes.texts]
    return "\n".join(words), to_tensor(figure)


def share(pixels: torch.Tensor, colour: tuple[float, float, float], tolerance: float = 0.02) -> float:
    """Part of the picture that has a colour."""
    return float(((pixels - torch.tensor(colour)).abs().amax(-1) < tolerance).float().mean())


def test_each_row_is_labelled_with_what_ran_and_its_time() -> None:
    rows = [Row("torch_sdpa", "torch_sdpa", step_ms=TIME, speedup=1.0),
            Row("flash_attn", "flash_attn_3", step_ms=Spread(5, 5, 5, 3), speedup=2.0)]  # fmt: skip
    words, _ = drawn(rows, [picture(), picture() + 0.1])
    for part in ("torch_sdpa", "reference\n10 ms per step (9-12)", "flash_attn -> flash_attn_3",
                 "about 2x faster\n5 ms per step (5-5)",
                 "largest difference 26 of 255", "PSNR 20.0 dB", "a different picture", "a machine; torch 2",
                 '"a red star", seed 7, 32x32, 20 steps', "can be seen", "Magenta: NaN"):  # fmt: skip
        assert part in words


def test_a_backend_that_did_not_run_has_a_panel_that_says_why() -> None:
    words, _ = drawn([Row("torch_sdpa"), Row("cudnn_attn", failed=NO_GPU)], [picture(), None])
    assert says([words], "didnotrun:needsanNVIDIAGPU")


def test_a_speed_that_may_be_chance_is_explained() -> None:
    rows = [Row("torch_sdpa", step_ms=TIME, speedup=1.0), Row("sdpa_math", step_ms=Spread(6.7, 6, 9.5, 3), speedup=1.5)]
    words, _ = drawn(rows, [picture(), picture()])
    assert "sdpa_math: about 1.5x faster, bit-identical" in words
    assert "chance\na machine; torch" in words
    clear = [Row(name, step_ms=time, total_ms=time) for name, time in (("a", TIME), ("b", Spread(5, 4, 6, 3)))]
    made = report(*clear)
    made.relate()
    assert "chance" not in "".join(text.get_text() for text in draw_pictures(made, [picture(), picture()]).texts)


def test_a_difference_is_coloured_by_its_size() -> None:
    def colours(difference: float) -> tuple[float, float, float]:
        """Shares of black, of blue, and of yellow to red."""
        image = picture()
        image += difference
        _, pixels = drawn([Row("torch_sdpa"), Row("sdpa_math")], [picture(), image])
        below = pixels[0, pixels.shape[1] // 2 : -300]  # the lower half, without the colour bar
        red, blue = below[..., 0], below[..., 2]
        black = share(below, (0, 0, 0))
        return black, float((blue - red > 0.1).float().mean()), float((red - blue > 0.3).float().mean())

    black, blue, warm = colours(0.0)
    assert black > 0.1 > blue + warm
    black, blue, warm = colours(0.5 / 255)
    assert blue > 0.1 > black + warm
    black, blue, warm = colours(100 / 255)
    assert warm > 0.1 > black + blue


def test_nan_is_magenta_and_named() -> None:
    image = picture()
    image[:, :16] = torch.nan
    words, pixels = drawn([Row("torch_sdpa"), Row("sol_attn", "sol_attn")], [picture(), image])
    assert re.search(r"\bbroken: NaN .*\b50 %", words)
    assert share(pixels, (1.0, 0.0, 1.0)) > 0.05


def test_one_wrong_pixel_of_a_large_picture_is_seen() -> None:
    image = picture(height=1024, width=1024)
    image[0, 100, 200] = 1.0
    _, pixels = drawn([Row("torch_sdpa"), Row("sol_attn")], [picture(height=1024, width=1024), image])
    red = (pixels[..., 0] - pixels[..., 2] > 0.3)[0, :-300].sum()
    assert red > 0


def test_a_video_shows_frames_from_first_to_last() -> None:
    words, _ = drawn([Row("torch_sdpa"), Row("x")], [picture(33), picture(33)], frames=33)
    assert "1, 12, 22, 33 " in words


def test_a_long_prompt_leaves_the_seed_readable() -> None:
    words, _ = drawn([Row("torch_sdpa")], [picture()], prompt="a long story " * 40)
    assert '...", seed 7, 32x32' in words.replace("\n", " ")


def test_attention_alone_is_a_chart_with_nan_in_words() -> None:
    def calls(error: float) -> list[CallScore]:
        return [CallScore(role, "0", "", TIME, error, 1.0) for role in ("self", "cross")]

    rows = [
        Row("torch_sdpa", "torch_sdpa", step_ms=TIME, speedup=1.0, calls=calls(1e-7)),
        Row("sol_attn", "sol_attn", step_ms=TIME, broken="NaN in all values", calls=calls(float("nan"))),
        Row("cudnn_attn", failed=NO_GPU),
    ]
    figure = draw(report(*rows, mode="attention"), [None, None, None])
    words = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert words.count("NaN") == 2
    assert any(text.get_text().startswith("cudnn_attn: did not run: ") for text in figure.texts)
    assert to_tensor(figure).shape[-1] == 3


def test_a_figure_without_any_result_is_drawn_all_the_same() -> None:
    rows = [Row("torch_sdpa", failed="out of memory"), Row("sdpa_math", failed="out of memory")]
    for mode in ("end_to_end", "attention"):
        assert to_tensor(draw(report(*rows, mode=mode), [None, None])).std() > 0


def test_as_many_pictures_as_rows(snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ValueError) as caught:
        draw_pictures(report(Row("a"), Row("b")), [picture()])
    assert str(caught.value) == snapshot


def test_the_file_is_what_the_tensor_shows(tmp_path: Path) -> None:
    from matplotlib.image import imread

    figure = draw_pictures(report(Row("torch_sdpa"), Row("x")), [picture(), picture()])
    save(figure, tmp_path / "comparison.png")
    read = torch.from_numpy(imread(tmp_path / "comparison.png"))[..., :3]
    pixels = to_tensor(figure)[0]
    assert read.shape == pixels.shape
    assert (read - pixels).abs().max() < 2 / 255
    assert SCALE[0] < 1 < SCALE[1]


def test_drawing_leaves_pyplot_alone() -> None:
    import subprocess
    import sys

    code = "import sys, matplotlib.figure; print('matplotlib.pyplot' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


# In a node


def real_rows(count: int) -> list[Row]:
    """Rows such as runs give, with a person's long label and the reasons of what did not run."""
    slow, once = Spread(1234, 1100, 22222, 3), Spread(20.5, 20.5, 20.5, 1)
    rows = [
        Row("torch_sdpa", "torch_sdpa", step_ms=TIME, total_ms=TIME),
        Row("sage_attn", "sage_fp8_cuda", label=LABEL, step_ms=Spread(5, 5, 6, 3), total_ms=Spread(5, 5, 6, 3)),
        Row("sage_attn_3", failed="package sageattn3 is not installed; needs a Blackwell GPU (sm100)"),
        Row("comfy", "torch_sdpa", step_ms=slow, total_ms=slow),
        Row("flash_attn", "flash_attn_3", step_ms=once, total_ms=once),
        Row(
            "cudnn_attn",
            "torch_sdpa",
            fell_back=40,
            failed=f"fell back: {NO_GPU}",
            step_ms=once,
        ),
    ]
    return rows[:count]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("size", [(1, 32, 32), (1, 60, 104), (1, 104, 60), (9, 60, 104)], ids=str)
def test_a_sheet_is_readable_in_a_node(count: int, size: tuple[int, int, int]) -> None:
    rows = real_rows(count)
    pictures = [None if row.step_ms is None else picture(*size) + 0.005 * at for at, row in enumerate(rows)]
    for row, image in zip(rows, pictures, strict=True):
        if image is not None and pictures[0] is not None:
            metrics.score(row, image, pictures[0])
    made = report(*rows, frames=size[0])
    made.relate()
    texts = check_readable(draw_pictures(made, pictures))
    assert says(texts, LABEL)
    assert any(re.search(r": 2x faster, slightly different \(PSNR 46 dB\)$", " ".join(text.split())) for text in texts)


@pytest.mark.parametrize("count", [2, 6])
def test_a_chart_of_calls_is_readable_in_a_node(count: int) -> None:
    rows = real_rows(count)
    for at, row in enumerate(rows):
        if row.step_ms is not None:
            errors = (1e-7 * 10**at, float("nan") if at == 1 else 1e-3)
            row.calls = [CallScore(LABEL, str(at), "", TIME, error, 1.0) for at, error in enumerate(errors)]
            row.relative_l2 = 1e-3
    made = report(*rows, mode="attention")
    made.relate()
    texts = check_readable(draw(made, [None] * count))
    assert says(texts, f"{LABEL}->sage_fp8_cuda")
    assert says(texts, f"{LABEL},block0")


def test_an_equal_picture_has_the_word_in_its_map() -> None:
    words, _ = drawn([Row("torch_sdpa"), Row("x"), Row("y")], [picture(), picture(), picture() + 0.1])
    assert words.splitlines().count("identical") == 1


@pytest.mark.parametrize("count", [1, 3])
def test_a_benchmark_is_readable_in_a_node(count: int) -> None:
    presets = [PRESETS[name] for name in ("hv15", "ltx2_audio_to_video", "wan22_14b_cross")[:count]]
    cases, _ = make_cases(presets, "bfloat16", "both", "key_padding")
    for case in cases:
        case.rows = [
            KernelResult(name, accuracy, "ok", 10 / at, 9.5 / at, 11 / at, 1e-3, 0.99, 2_000_000)
            for at, (name, accuracy) in enumerate(
                (("torch_sdpa", "exact"), ("sage_attn", "quantized"), (LABEL, "exact")), 1
            )
        ]
        case.rows.append(KernelResult("aiter", "exact", "mask kind key_padding not in (none)"))
    machine = "cpu, a processor with a long name, 128 cores, 64 in use by torch, Linux x86_64"
    made = BenchReport(cases, "bfloat16", 0, 1024, "cpu", "", machine, {"torch": "2.13.0+cpu", "comfyui": "0.33.0"})
    texts = check_readable(draw_benchmark(made))
    assert says(texts, LABEL)
    assert sum("ms per call" in text for text in texts) == len(cases)
    assert any(text.startswith("HunyuanVideo 1.5, masked: ") for text in texts)
    assert not any("hv15" in text for text in texts)
