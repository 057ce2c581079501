"""Presets of the benchmark: shapes of attention calls of real models, each with its source.

Sizes are of one call: query (batch, num_heads, q_len, head_dim), key and value with kv_len. In the masked case the last
`padded` keys are hidden; padding elsewhere is the same amount of work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..backends.values.grid import TokenGrid
from ..backends.values.request import AttentionRequest

SCRIPT = "vLLM-Omni, benchmarks/diffusion/bench_attention_backends.py: its three presets"
STUDY = "shapes that vLLM-Omni's pull requests report for the model at 480p or 1024x1024"
LTX2 = "vLLM-Omni's report on LTX-2; head sizes from ComfyUI, comfy/ldm/lightricks/av_model.py"

AS_WRITTEN = ", as the script has it"
"""Behind the name of a model whose shape is the script's, not the study's."""

MASK_KINDS = ("key_padding", "bool", "bias")
"""Masks of masked cases: (B, 1, 1, K) bool, (B, 1, Q, K) bool, (B, 1, Q, K) additive."""


@dataclass(frozen=True)
class Preset:
    """One attention call of a model."""

    name: str
    model: str
    num_heads: int
    q_len: int
    kv_len: int
    source: str
    head_dim: int = 128
    padded: int = 0
    """Hidden keys at the end in the masked case; 0: the model has no mask, so there is no such case."""
    batch: int = 1
    full: tuple[int, int, int] | None = None
    """(q_len, kv_len, padded) before scaling; None if not scaled."""
    grid: TokenGrid | None = None
    """Of self-attention whose tokens lie in frames, height and width: such a case has rows of sparse methods too."""

    @property
    def title(self) -> str:
        """The model's name in words, without where its shape comes from."""
        return self.model.removesuffix(AS_WRITTEN)

    def scaled(self, tokens: int) -> Preset:
        """The call scaled so that its longest length is `tokens`, never up; lengths are at least 1. 0: full size."""
        longest = max(self.q_len, self.kv_len)
        if not tokens or tokens >= longest:
            return self
        q_len, kv_len = (max(1, round(length * tokens / longest)) for length in (self.q_len, self.kv_len))
        padded = min(kv_len - 1, max(1, round(self.padded * tokens / longest))) if self.padded else 0
        full = (self.q_len, self.kv_len, self.padded)
        if self.grid is not None:
            grid = scaled_grid(self.grid, tokens)
            return replace(self, q_len=grid.tokens, kv_len=grid.tokens, full=full, grid=grid)
        return replace(self, q_len=q_len, kv_len=kv_len, padded=padded, full=full)

    def request(self, dtype: str, mask: str = "none") -> AttentionRequest:
        """The facts of this call; `mask` is `none` or one of `MASK_KINDS`."""
        return AttentionRequest(
            self.batch,
            self.num_heads,
            self.q_len,
            self.kv_len,
            self.head_dim,
            dtype,
            self.num_heads,
            self.head_dim,
            mask,
            grid=self.grid,
        )


def scaled_grid(grid: TokenGrid, tokens: int) -> TokenGrid:
    """A grid of about the same shape with at most `tokens` tokens, those beside it in proportion; at least one cell."""
    before, after = (round(count * tokens / grid.tokens) for count in (grid.before, grid.after))
    share = (max(tokens - before - after, 1) / grid.cells) ** (1 / 3)
    frames, height, width = (max(1, int(length * share + 1e-9)) for length in grid.shape)
    return grid._replace(frames=frames, height=height, width=width, before=before, after=after)


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("hv15", f"HunyuanVideo 1.5{AS_WRITTEN}", 24, 14336, 14336, SCRIPT, padded=256),
        Preset("wan22", f"Wan 2.2{AS_WRITTEN}", 40, 16384, 16384, SCRIPT, padded=256),
        Preset("flux", f"FLUX{AS_WRITTEN}", 24, 4096, 4096, SCRIPT, padded=256),
        Preset("hunyuan_video_15", "HunyuanVideo 1.5", 16, 14296, 14296, STUDY, padded=256),
        Preset("wan22_14b_self", "Wan 2.2 14B, self-attention", 40, 14040, 14040, STUDY),
        Preset("wan22_14b_cross", "Wan 2.2 14B, cross-attention", 40, 14040, 512, STUDY),
        Preset("flux2", "FLUX.2 dev", 48, 4608, 4608, STUDY, padded=512),
        Preset("z_image", "Z-Image", 30, 4352, 4352, STUDY, padded=256),
        # 24 heads of 128 are the defaults of QwenImageTransformer2DModel, which ComfyUI's model_detection leaves
        # unchanged. 1024x1024 is a latent of 128x128 and, at patch size 2, 64 * 64 = 4096 picture tokens. Before them
        # stand the text's: ComfyUI drops the 34 of its template, so that "A dog running across a field of golden
        # wheat." is 15. Text is not padded and a mask that hides nothing is dropped, so there is no masked case.
        Preset(
            "qwen_image", "Qwen-Image, 1024x1024", 24, 4111, 4111,
            "ComfyUI, comfy/ldm/qwen_image/model.py: 64 * 64 picture tokens and 15 text tokens",
        ),
        Preset("ltx2_video", "LTX-2, video self-attention", 32, 5070, 5070, LTX2),
        Preset("ltx2_audio", "LTX-2, audio self-attention", 32, 100, 100, LTX2, head_dim=64),
        # The source names these v2a; in ComfyUI video queries with audio keys are audio_to_video_attn.
        Preset("ltx2_audio_to_video", "LTX-2, video queries on audio keys", 32, 5070, 100, LTX2, head_dim=64),
    )
}  # fmt: skip


def _video(name: str, model: str, num_heads: int, grid: TokenGrid, source: str) -> Preset:
    return Preset(name, model, num_heads, grid.tokens, grid.tokens, source, grid=grid)


GRIDS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        # Latents have a quarter of the frames and an eighth of the sides (Wan), the patch is 1x2x2.
        _video(
            "wan22_480p", "Wan 2.2 14B, 81 frames of 832x480", 40, TokenGrid(21, 30, 52),
            "ComfyUI, comfy/ldm/wan/model.py: latent 21x60x104, patch 1x2x2",
        ),
        _video(
            "wan22_720p", "Wan 2.2 14B, 81 frames of 1280x720", 40, TokenGrid(21, 45, 80),
            "ComfyUI, comfy/ldm/wan/model.py: latent 21x90x160, patch 1x2x2",
        ),
        # A quarter of the frames, a sixteenth of the sides, patch 1; the prompt stands before the video.
        _video(
            "hunyuan_video_15_480p", "HunyuanVideo 1.5, 121 frames of 848x480", 16, TokenGrid(31, 30, 53, before=256),
            "ComfyUI, comfy/ldm/hunyuan_video/model.py: latent 31x30x53, patch 1; 256 tokens of text as in hv15",
        ),
        # An eighth of the frames, a thirty-second of the sides, patch 1.
        _video(
            "ltx2_720p", "LTX-2, video self-attention, 121 frames of 1280x704", 32, TokenGrid(16, 22, 40),
            "ComfyUI, comfy/ldm/lightricks: latent 16x22x40, patch 1",
        ),
    )
}  # fmt: skip
"""Calls of long videos with their token grids; measured where they are named."""


def parse_presets(text: str) -> list[Preset]:
    """The named presets, in this order; all of `PRESETS` for `all` or an empty text, all of `GRIDS` for `grids`.

    Raises:
        ValueError: an unknown name; the message lists the presets.
    """
    names = list(dict.fromkeys(filter(None, (name.strip().lower() for name in text.split(",")))))
    known = {**PRESETS, **GRIDS}
    groups = {"all": list(PRESETS.values()), "grids": list(GRIDS.values())}
    unknown = [name for name in names if name not in known and name not in groups]
    if unknown:
        raise ValueError(f"no preset is called {', '.join(unknown)}; there are: {', '.join((*groups, *known))}")
    found = [preset for name in names or ["all"] for preset in groups.get(name) or [known[name]]]
    return list(dict.fromkeys(found))


def largest(presets: Sequence[Preset]) -> int:
    """Elements of query, key and value of the largest of these calls."""
    return max(
        preset.batch * preset.num_heads * preset.head_dim * (preset.q_len + 2 * preset.kv_len) for preset in presets
    )
