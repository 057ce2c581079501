"""Presets of the benchmark: shapes of attention calls of real models, each with its source.

Sizes are of one call: query (batch, num_heads, q_len, head_dim), key and value with kv_len. In the masked case the last
`padded` keys are hidden; padding elsewhere is the same amount of work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
        )


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


def parse_presets(text: str) -> list[Preset]:
    """The named presets, in this order; every one for `all` or an empty text.

    Raises:
        ValueError: an unknown name; the message lists the presets.
    """
    names = list(dict.fromkeys(filter(None, (name.strip().lower() for name in text.split(",")))))
    unknown = [name for name in names if name not in (*PRESETS, "all")]
    if unknown:
        raise ValueError(f"no preset is called {', '.join(unknown)}; there are: all, {', '.join(PRESETS)}")
    return list(PRESETS.values()) if not names or "all" in names else [PRESETS[name] for name in names]


def largest(presets: Sequence[Preset]) -> int:
    """Elements of query, key and value of the largest of these calls."""
    return max(
        preset.batch * preset.num_heads * preset.head_dim * (preset.q_len + 2 * preset.kv_len) for preset in presets
    )
