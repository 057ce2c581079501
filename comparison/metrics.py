"""How far one result is from another: pictures by PSNR and SSIM, and what of it is not finite.

Tensors in, floats out. A picture is (frames, height, width, 3) with values in 0..1; a still has one frame.
A result that holds NaN or infinity gives NaN, never an error: that a result is broken is a finding.

Boundary: torch and scikit-image; it fills in a report's rows, and knows nothing of models or backends.
"""

from __future__ import annotations

import importlib
import math
import statistics
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..backends.measure.error import finite
from .report import FrameScore, Row

if TYPE_CHECKING:
    from torch import Tensor

NEEDED = {"skimage": "scikit-image", "matplotlib": "matplotlib"}
"""What a comparison needs beyond torch: module and distribution, both are in requirements.txt."""

WINDOW = 11
"""Pixels on a side of SSIM's Gaussian window (sigma 1.5, cut at 3.5 sigma)."""


class MissingPackageError(ValueError):
    """A package that a comparison needs is not installed; the message has the command that installs it."""


def need(module: str) -> ModuleType:
    """Import a module of `NEEDED`, or one inside it.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in NEEDED:
            raise
        packages = " ".join(NEEDED.values())
        raise MissingPackageError(
            f"a comparison needs the package {NEEDED[module.split('.')[0]]}, which is not installed; "
            f"run: python -m pip install {packages}"
        ) from error


def psnr(image: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all frames, for a peak of 1; infinite for equal pictures.

    Raises:
        ValueError: the shapes differ or are not (frames, height, width, 3).
    """
    _check(image, reference)
    if not finite(image, reference):
        return math.nan
    squared_error = need("skimage.metrics").mean_squared_error
    pairs = zip(image, reference, strict=True)  # frame by frame: a video in float64 would fill the memory
    error = statistics.fmean(squared_error(_array(wanted), _array(frame)) for frame, wanted in pairs)
    return -10 * math.log10(error) if error > 0 else math.inf


def ssim(image: Tensor, reference: Tensor) -> float:
    """Structural similarity, the mean over frames, 1 for equal pictures.

    Settings of Wang et al. 2004 (Image quality assessment: from error visibility to structural similarity):
    Gaussian window of 11 x 11, sigma 1.5, K1 0.01, K2 0.03, colours averaged.

    Raises:
        ValueError: the shapes differ or are not (frames, height, width, 3), or a side is under 11.
    """
    _check(image, reference)
    if min(image.shape[1:3]) < WINDOW:
        raise ValueError(f"picture of {image.shape[2]}x{image.shape[1]} pixels < SSIM's window of {WINDOW}x{WINDOW}")
    if not finite(image, reference):
        return math.nan
    similarity = need("skimage.metrics").structural_similarity
    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    pairs = zip(image, reference, strict=True)
    return statistics.fmean(
        similarity(_array(wanted), _array(frame), data_range=1, channel_axis=-1, **wang) for frame, wanted in pairs
    )


def score(row: Row, picture: Tensor, reference: Tensor) -> None:
    """Write into a row how its picture differs from the reference's, as a whole and frame by frame.

    A picture with NaN or infinity gets `broken` in words, and NaN as its numbers. SSIM stays None where a side is
    shorter than its window. Raises ValueError as `psnr` does.
    """
    _check(picture, reference)
    large = min(picture.shape[1:3]) >= WINDOW
    row.broken = row.broken or what_is_not_finite(picture)
    row.identical = bool((picture == reference).all())
    row.max_difference = float((picture.float() - reference.float()).abs().max())
    if row.identical:
        row.psnr, row.ssim = math.inf, 1.0
        row.frame_scores = [FrameScore(math.inf, 1.0) for _ in picture]
        return
    row.psnr = psnr(picture, reference)
    frames = [(picture[at : at + 1], reference[at : at + 1]) for at in range(len(picture))]
    row.frame_scores = [FrameScore(psnr(*pair), ssim(*pair) if large else math.nan) for pair in frames]
    row.ssim = statistics.fmean(frame.ssim for frame in row.frame_scores) if large else None


def what_is_not_finite(tensor: Tensor) -> str | None:
    """In words how much of a tensor is NaN or infinite; None when nothing is."""
    parts = []
    for word, hits in (("NaN", tensor.isnan()), ("infinite", tensor.isinf())):
        count = int(hits.sum())
        if count:
            share = 100 * count / tensor.numel()
            parts.append(f"{word} in {'all' if count == tensor.numel() else f'{share:.2g} % of the'} values")
    return ", ".join(parts) or None


def _array(frame: Tensor) -> Any:
    return frame.double().cpu().numpy()


def _check(image: Tensor, reference: Tensor) -> None:
    if image.shape != reference.shape:
        raise ValueError(f"shapes {tuple(image.shape)} and {tuple(reference.shape)} differ: they cannot be compared")
    if image.ndim != 4 or image.shape[3] != 3:
        raise ValueError(f"picture of shape {tuple(image.shape)}: expected (frames, height, width, 3)")
