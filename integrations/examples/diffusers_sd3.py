"""SD3 in Diffusers with tiny random weights: exact kernels in the first half of the steps, INT8 arithmetic after it.

    python integrations/examples/diffusers_sd3.py

`emulated_int8` computes on any device what INT8 kernels round; on a card choose `sage_attn`.
"""

import torch
from attention_backends.integrations.diffusers import apply, reset
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline


def tiny_pipeline() -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
        pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    parts = dict.fromkeys(
        ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    )
    return StableDiffusion3Pipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **parts)


def main() -> str:
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    config = {"default": "torch_sdpa", "schedule": [{"backend": "emulated_int8", "percent": "0.5-1"}]}
    applied = apply(pipe, config)
    pipe(
        prompt_embeds=torch.zeros(1, 6, 32), pooled_prompt_embeds=torch.zeros(1, 64), guidance_scale=1.0, height=64,
        width=64, num_inference_steps=4, output_type="latent",
    )  # fmt: skip
    summary = applied.summary()
    reset(pipe)
    return summary


if __name__ == "__main__":
    print(main())
