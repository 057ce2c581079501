"""Clips as pictures: an animated WebP that holds every colour, and frames side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from attention_backends.comparison.film import MS, NAN_COLOUR, SEAM, save_film, side_by_side  # noqa: E402
from attention_backends.comparison.report import ComparisonError  # noqa: E402
from attention_backends.comparison.scene import Settings  # noqa: E402
from attention_backends.demo.model import WEIGHTS  # noqa: E402
from attention_backends.devtools.inside import make_films  # noqa: E402
from PIL import Image, ImageSequence  # noqa: E402


def test_a_film_holds_the_frames_of_all_clips(tmp_path: Path) -> None:
    torch.manual_seed(0)
    clips = [(torch.rand(3, 4, 6, 3) * 255).round() / 255 for _ in range(2)]
    save_film(clips, tmp_path / "film.webp", times=2)
    with Image.open(tmp_path / "film.webp") as film:
        assert (film.format, film.n_frames, film.info["loop"]) == ("WEBP", 3, 0)
        assert film.size == (2 * (6 + SEAM + 6), 2 * 4)
        for number, frame in enumerate(ImageSequence.Iterator(film)):
            frame.load()
            assert frame.info["duration"] == MS
            pixels = torch.frombuffer(bytearray(frame.convert("RGB").tobytes()), dtype=torch.uint8)
            shown = pixels.view(8, -1, 3)[::2, ::2].float() / 255
            assert torch.allclose(shown[:, :6], clips[0][number], atol=1e-6)
            assert torch.allclose(shown[:, 6 + SEAM :], clips[1][number], atol=1e-6)


@pytest.mark.parametrize("clips", [[], [torch.zeros(2, 4, 4, 3), torch.zeros(3, 4, 4, 3)]], ids=["none", "lengths"])
def test_a_film_needs_clips_of_one_shape(clips: list[torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(ComparisonError, match=f"clips of {len(clips)} shapes"):
        save_film(clips, tmp_path / "film.webp")
    assert not list(tmp_path.iterdir())


def test_frames_stand_side_by_side() -> None:
    clip = torch.rand(3, 4, 5, 3)
    clip[1, 2, 3, 0] = torch.nan
    strip = side_by_side(clip)
    assert strip.shape == (4, 3 * 5 + 2 * SEAM, 3)
    assert torch.equal(strip[:, :5], clip[0])
    assert torch.equal(strip[2, 5 + SEAM + 3], torch.tensor(NAN_COLOUR))
    assert torch.equal(strip[:, -5:], clip[2])


def test_the_demo_makes_a_film_of_each_and_one_of_both(tmp_path: Path) -> None:
    settings = Settings(prompt=make_films.CAPTION, frames=3, width=16, height=16, steps=5, device="cpu")
    lines = make_films.make_films(tmp_path / "out", WEIGHTS, settings)
    sizes = {}
    for path in sorted((tmp_path / "out").iterdir()):
        with Image.open(path) as film:
            sizes[path.name] = (film.size, film.n_frames)
    assert sizes == {
        "film_both.webp": ((6 * (16 + SEAM + 16), 6 * 16), 3),
        "film_dense.webp": ((6 * 16, 6 * 16), 3),
        "film_sparse.webp": ((6 * 16, 6 * 16), 3),
    }
    assert [any(name in line for line in lines) for name in sizes] == [True, True, True]
    assert "PSNR" in lines[-1], "the sparse method left something out in the last step"
