"""Metrics of a comparison against values computed by hand or by the formula of the paper."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from attention_backends.backends.measure.error import cosine, relative_l2
from attention_backends.comparison import metrics
from attention_backends.comparison.report import Row
from syrupy.assertion import SnapshotAssertion


def flat(value: float, frames: int = 1, side: int = 16) -> torch.Tensor:
    return torch.full((frames, side, side, 3), value, dtype=torch.float64)


def noise(seed: int, frames: int = 2, side: int = 20) -> torch.Tensor:
    return torch.rand(frames, side, side, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("value", "expected"), [(0.6, 20.0), (0.51, 40.0), (1.0, 6.0206)])
def test_psnr_of_a_constant_difference(value: float, expected: float) -> None:
    assert metrics.psnr(flat(value), flat(0.5)) == pytest.approx(expected, abs=1e-4)


def test_psnr_of_a_video_is_that_of_the_mean_error() -> None:
    video = torch.cat([flat(0.5), flat(0.6)])  # squared error 0 and 0.01
    assert metrics.psnr(video, flat(0.5, frames=2)) == pytest.approx(-10 * math.log10(0.005))


def test_ssim_of_flat_pictures_is_their_luminance_term() -> None:
    expected = (2 * 0.25 * 0.75 + 0.01**2) / (0.25**2 + 0.75**2 + 0.01**2)
    assert metrics.ssim(flat(0.25), flat(0.75)) == pytest.approx(expected, abs=1e-9)


def test_ssim_equals_the_formula() -> None:
    """Wang et al. 2004, equation 13, with the windows that lie inside the picture."""
    image, reference = noise(1), noise(1) * 0.8 + noise(2) * 0.2
    at = torch.arange(11.0, dtype=torch.float64) - 5
    bell = torch.exp(-(at**2) / (2 * 1.5**2))
    bell = bell / bell.sum()
    window = torch.outer(bell, bell)[None, None]

    def mean(values: torch.Tensor) -> torch.Tensor:
        return F.conv2d(values.movedim(-1, 1).flatten(0, 1)[:, None].double(), window)

    x, y = image.double(), reference.double()
    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    expected = ((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()
    assert metrics.ssim(image, reference) == pytest.approx(float(expected), abs=1e-6)
    assert 0.5 < metrics.ssim(image, reference) < 1


def test_relative_l2_and_cosine_by_hand() -> None:
    reference = torch.tensor([3.0, 4.0])
    assert relative_l2(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.1)
    assert cosine(torch.tensor([4.0, -3.0]), reference) == pytest.approx(0.0, abs=1e-15)
    assert cosine(torch.tensor([6.0, 8.0]), reference) == pytest.approx(1.0)
    assert cosine(torch.tensor([-3.0, -4.0]), reference) == pytest.approx(-1.0)


def test_a_reference_of_zeros() -> None:
    zero = torch.zeros(2)
    assert relative_l2(zero, zero) == 0
    assert relative_l2(torch.ones(2), zero) == math.inf
    assert math.isnan(cosine(torch.ones(2), zero))


def test_half_types_are_measured_in_float64() -> None:
    reference = torch.full((4,), 60000.0, dtype=torch.float16)  # its square overflows float16
    assert relative_l2(reference, reference) == 0
    assert cosine(reference, reference) == pytest.approx(1)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_finite_gives_nan_and_words(wrong: float) -> None:
    image = noise(1)
    image[0, 0, 0, 0] = wrong
    for metric in (metrics.psnr, metrics.ssim, relative_l2, cosine):
        assert math.isnan(metric(image, noise(1)))
    words = metrics.what_is_not_finite(image)
    assert words is not None
    assert ("NaN" if math.isnan(wrong) else "infinite") in words
    assert metrics.what_is_not_finite(noise(1)) is None
    assert metrics.what_is_not_finite(torch.full((2,), math.nan)) == "NaN in all values"


def test_a_row_gets_every_number_frame_by_frame() -> None:
    reference = noise(1, frames=3)
    image = reference.clone()
    image[1] = (image[1] + 0.1).clamp(max=1)
    row = Row("sdpa_math")
    metrics.score(row, image, reference)
    assert [frame.psnr for frame in row.frame_scores] == [math.inf, metrics.psnr(image[1:2], reference[1:2]), math.inf]
    assert row.psnr == metrics.psnr(image, reference)
    assert row.ssim == pytest.approx(metrics.ssim(image, reference))
    assert row.max_difference == pytest.approx(0.1, abs=1e-6)
    assert row.identical is False
    assert row.broken is None


def test_a_row_of_the_same_picture_is_identical() -> None:
    row = Row("sdpa_math")
    metrics.score(row, noise(1), noise(1))
    assert (row.identical, row.psnr, row.ssim, row.max_difference) == (True, math.inf, 1.0, 0.0)
    assert row.verdict == "bit-identical"


def test_pictures_under_the_window_have_no_ssim(snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ValueError) as caught:
        metrics.ssim(flat(0.1, side=8), flat(0.2, side=8))
    assert str(caught.value) == snapshot
    row = Row("sdpa_math")
    metrics.score(row, flat(0.1, side=8), flat(0.2, side=8))
    assert row.ssim is None
    assert row.psnr == pytest.approx(20)


def test_shapes_that_cannot_be_compared_are_named(snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ValueError) as caught:
        metrics.psnr(flat(0.5), flat(0.5, frames=2))
    assert str(caught.value) == snapshot
    with pytest.raises(ValueError) as caught:
        metrics.psnr(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16))
    assert str(caught.value) == snapshot


@pytest.mark.parametrize("module", ["skimage.metrics", "matplotlib.figure"])
def test_a_missing_package_is_an_error_with_its_command(
    module: str, monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == module.split(".")[0]]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, module.split(".")[0], None)
    with pytest.raises(metrics.MissingPackageError) as caught:
        metrics.need(module)
    assert str(caught.value) == snapshot
