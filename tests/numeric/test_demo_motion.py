"""Captions and clips of the embedded video model: what they mean, and that words which look alike mean two things."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from attention_backends.demo import captions, judge_motion, latents, motion, pause, train


def test_every_clip_stays_in_the_picture_and_its_caption_is_known() -> None:
    rng = random.Random(0)
    for _ in range(300):
        clip = motion.random_clip(rng)
        captions.encode(clip.caption())
        for mover in clip.movers:
            for frame in range(motion.FRAMES):
                assert all(abs(at) <= 1.0001 for at in mover.place(frame)), clip


@pytest.mark.parametrize("direction", motion.DIRECTIONS)
def test_a_drawn_shape_moves_as_its_caption_says(direction: str) -> None:
    for speed in motion.SPEEDS:
        start = motion.starts(direction, speed)[0]
        clip = motion.Clip((motion.Mover("red", "circle", "small", direction, speed, start),), "black")
        drawn = motion.draw_clip(clip, 8, 32, 32)[0] > 0.4
        middles = [frame.nonzero().float().mean(0).flip(0) / 32 for frame in (drawn[0], drawn[-1])]
        reach = 0.5 - captions.SIZES["small"] - captions.MARGIN
        moved = torch.tensor(motion.DIRECTIONS[direction]) * motion.SPEEDS[speed] * reach
        assert torch.allclose(middles[1] - middles[0], moved, atol=0.065)  # middles are at corners of patches


def test_a_short_clip_is_the_start_of_a_longer_one() -> None:
    clip = motion.random_clip(random.Random(3))
    assert torch.equal(motion.draw_clip(clip, 4, 16, 16), motion.draw_clip(clip, 8, 16, 16)[:, :4])
    short = latents.rgb_to_latent(motion.draw_clip(clip, 4, 16, 16)[None])
    whole = latents.rgb_to_latent(motion.draw_clip(clip, 8, 16, 16)[None])
    assert torch.equal(short, whole[:, :, :4])


@pytest.mark.parametrize("shape", motion.CLIP_SHAPES)
def test_a_moving_shape_keeps_its_outline(shape: str) -> None:
    clip = motion.Clip((motion.Mover("red", shape, "small", "right", "fast", "on the left"),), "black")
    frames = motion.draw_clip(clip, 8, 32, 32)[0]
    outlines = [frame[:, frame.amax(0) > 0.07] for frame in frames]
    assert all(torch.equal(outline, outlines[0]) for outline in outlines)


def test_of_two_crossing_shapes_the_first_is_in_front() -> None:
    first, second = motion.crossing_mover("red", "square", "right"), motion.crossing_mover("blue", "square", "left")
    middle = motion.draw_clip(motion.Clip((first, second)), 8, 32, 32)[:, 3:5, 16, 16]
    assert torch.allclose(middle, torch.tensor(captions.COLOURS["red"])[:, None].expand(3, 2), atol=0.02)


def test_models_that_see_no_order_can_tell_these_captions_apart() -> None:
    def bag(caption: str) -> list[list[float]]:
        return sorted(captions.encode(caption)[:, :64].tolist())

    pairs = (
        ("a red ring moving left slowly from the right", "a red ring moving right slowly from the left"),
        (
            "a red ring moving left and a blue star moving right",
            "a blue ring moving left and a red star moving right",
        ),
        ("a red ring moving left and a blue star moving up", "a red ring moving up and a blue star moving left"),
    )
    for one, other in pairs:
        assert bag(one) != bag(other)
    assert bag("a red ring on the left") == bag("on the left a red ring")


def test_a_picture_keeps_its_latent_and_a_clip_carries_its_time() -> None:
    rgb = torch.rand(1, 3, 1, 8, 8)
    picture = latents.rgb_to_latent(rgb)
    clip = latents.rgb_to_latent(rgb.expand(1, 3, 8, 8, 8))
    assert torch.allclose(latents.latent_to_rgb(clip)[:, 3], rgb[:, :, 0].movedim(1, -1), atol=1e-5)
    apart = (clip - picture).flatten(3).std(-1)
    assert apart.max() < 1e-5  # the same for every cell of a frame
    assert not torch.allclose(clip[:, :, 0], clip[:, :, 7], atol=0.5)


def test_training_waits_for_a_lock_of_a_process_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pause.tempfile, "gettempdir", lambda: str(tmp_path))
    assert not pause.locked()
    with pause.training_paused():
        assert pause.locked()
    (tmp_path / f"{pause.PREFIX}99999999").touch()
    (tmp_path / f"{pause.PREFIX}nonsense").touch()
    assert not pause.locked()
    assert pause.wait(0.01) < 1


def test_a_batch_of_the_video_model() -> None:
    stages = (train.Stage(1, ((4, 16, 16),), (1e-3, 0)),)
    latent, noise, times, context, weights = train.make_batch(0, 0, stages)
    assert latent.shape == noise.shape == (8, 16, 4, 16, 16)
    assert times.shape == weights.shape == (8,)
    assert context.shape == (8, 16, 4096)
    assert torch.equal(latent, train.make_batch(0, 0, stages)[0])


@pytest.fixture(scope="module")
def drawn_clips() -> tuple[list[motion.Clip], torch.Tensor]:
    rng = random.Random(5)
    wanted = [motion.random_clip(rng, crossing=0.3) for _ in range(40)]
    rgb = torch.stack([motion.draw_clip(clip, 8, 32, 32).permute(1, 2, 3, 0) for clip in wanted])
    noise = 0.03 * torch.randn(rgb.shape, generator=torch.Generator().manual_seed(0))
    return wanted, (rgb + noise).clamp(0, 1)


def test_the_judge_passes_drawings(drawn_clips: tuple[list[motion.Clip], torch.Tensor]) -> None:
    for name, (right, count) in judge_motion.table(*drawn_clips).items():
        assert right == count, name


@pytest.mark.parametrize("name", judge_motion.spoiled(1))
def test_the_judge_fails_spoiled_films(name: str, drawn_clips: tuple[list[motion.Clip], torch.Tensor]) -> None:
    wanted, rgb = drawn_clips
    right, count = judge_motion.table(wanted, judge_motion.spoiled(len(wanted))[name](rgb))["shape and direction"]
    assert right <= count / 20


def test_the_judge_fails_noise_and_plain_films() -> None:
    clip = motion.random_clip(random.Random(0), crossing=0)
    generator = torch.Generator().manual_seed(0)
    for film in (torch.rand(8, 32, 32, 3, generator=generator), torch.full((8, 32, 32, 3), 0.97)):
        assert not judge_motion.both(judge_motion.score(clip, film))
