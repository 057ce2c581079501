"""The picture: every row has its panel, differences and NaN show in their colours, odd input does not break it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from attention_backends.comparison import metrics
from attention_backends.comparison.picture import SCALE, draw, draw_pictures, save, to_tensor
from attention_backends.comparison.report import CallScore, Report, Row, Spread
from syrupy.assertion import SnapshotAssertion

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
    for part in ("torch_sdpa", "10 ms per step (9-12)\nreference", "flash_attn -> flash_attn_3",
                 "5 ms per step (5-5)\nspeed ~2.00x",
                 "largest difference 26 of 255", "PSNR 20.0 dB", "a different picture", "a machine; torch 2",
                 '"a red star", seed 7, 32x32, 20 steps', "can be seen", "magenta: NaN"):  # fmt: skip
        assert part in words


def test_a_backend_that_did_not_run_has_a_panel_that_says_why() -> None:
    words, _ = drawn([Row("torch_sdpa"), Row("cudnn_attn", failed="device cpu not in (cuda)")], [picture(), None])
    assert "cpu not in\n(cuda)" in words


def test_a_speed_that_may_be_chance_is_explained_whole_on_a_narrow_sheet() -> None:
    rows = [Row("torch_sdpa", step_ms=TIME, speedup=1.0), Row("sdpa_math", step_ms=TIME, speedup=1.0)]
    words, _ = drawn(rows, [picture(), picture()])
    assert "speed ~1.00x" in words
    assert "chance\na machine; torch" in words
    named = report(*rows)
    named.machine = "a machine with a name that is long, 128 cores of which 64 are in use by torch, Linux x86_64"
    said = "\n".join(text.get_text() for text in draw_pictures(named, [picture(), picture()]).texts)
    assert "chance\na machine with" in said


def test_a_difference_is_coloured_by_its_size() -> None:
    def colours(difference: float) -> tuple[float, float, float]:
        """Shares of black, of blue, and of yellow to red."""
        image = picture()
        image += difference
        _, pixels = drawn([Row("torch_sdpa"), Row("sdpa_math")], [picture(), image])
        below = pixels[0, pixels.shape[1] // 2 : -140]  # the lower half, without the colour bar
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
    red = (pixels[..., 0] - pixels[..., 2] > 0.3)[0, :-140].sum()
    assert red > 0


def test_a_video_shows_frames_from_first_to_last() -> None:
    words, _ = drawn([Row("torch_sdpa"), Row("x")], [picture(33), picture(33)], frames=33)
    assert "1, 12, 22, 33 " in words


def test_a_long_prompt_leaves_the_seed_readable() -> None:
    words, _ = drawn([Row("torch_sdpa")], [picture()], prompt="a long story " * 40)
    assert '...", seed 7, 32x32' in words


@pytest.mark.parametrize("size", [(32, 32), (480, 832), (832, 480), (16, 128)])
def test_no_text_stands_on_another(size: tuple[int, int]) -> None:
    slow = Spread(1234, 1100, 22222, 3)
    rows = [Row(f"backend_{at}", "flash_attn_3", step_ms=slow, speedup=1.0) for at in range(6)]
    rows.append(Row("sage_attn_3", failed="package sageattn3 is not installed; compute capability 9.0 not in (10.0)"))
    rows.append(Row("oom", "oom", step_ms=TIME, failed="out of memory: try a smaller size (in run 2 of 3)"))
    pictures: list[torch.Tensor | None] = [picture(1, *size) + 0.01 * at for at in range(6)]
    pictures += [None, picture(1, *size)]
    for row, image in zip(rows, pictures, strict=True):
        if image is not None and pictures[0] is not None:
            metrics.score(row, image, pictures[0])
    figure = draw_pictures(report(*rows), pictures)
    to_tensor(figure)
    boxes = [(text.get_text(), text.get_window_extent()) for text in figure.texts if text.get_text()]
    for at, (one, here) in enumerate(boxes):
        assert here.x0 >= 0, f"{one!r} leaves the sheet"
        assert here.x1 <= figure.bbox.width, f"{one!r} leaves the sheet"
        for other, there in boxes[:at]:
            assert not here.overlaps(there), f"{one!r} stands on {other!r}"


def test_attention_alone_is_a_chart_with_nan_in_words() -> None:
    def calls(error: float) -> list[CallScore]:
        return [CallScore(role, "0", "", TIME, error, 1.0) for role in ("self", "cross")]

    rows = [
        Row("torch_sdpa", "torch_sdpa", step_ms=TIME, speedup=1.0, calls=calls(1e-7)),
        Row("sol_attn", "sol_attn", step_ms=TIME, broken="NaN in all values", calls=calls(float("nan"))),
        Row("cudnn_attn", failed="device cpu not in (cuda)"),
    ]
    figure = draw(report(*rows, mode="attention"), [None, None, None])
    words = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert words.count("NaN") == 2
    assert any("run: device cpu" in text for text in words)
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
