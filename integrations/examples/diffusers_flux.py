"""FLUX in Diffusers with tiny random weights: exact kernels in the first step, another backend in one role.

    python integrations/examples/diffusers_flux.py

With real weights only `tiny_pipeline` differs: `FluxPipeline.from_pretrained(...)`, and a prompt instead of embeddings.
"""

import torch
from attention_backends.integrations.diffusers import apply, reset
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel


def tiny_pipeline() -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **parts)


def main() -> str:
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    config = {
        "default": "torch_sdpa",
        "per_role": {"flux.single": "sdpa_math"},
        "schedule": [{"backend": "reference", "steps": "0"}],
    }
    applied = apply(pipe, config)
    pipe(
        prompt_embeds=torch.zeros(1, 5, 32), pooled_prompt_embeds=torch.zeros(1, 32), height=64, width=64,
        num_inference_steps=3, output_type="latent",
    )  # fmt: skip
    summary = applied.summary()
    reset(pipe)
    return summary


if __name__ == "__main__":
    print(main())
