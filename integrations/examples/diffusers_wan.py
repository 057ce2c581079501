"""Wan in Diffusers with tiny random weights: a sparse method for self-attention, on the grid of the model's shapes.

python integrations/examples/diffusers_wan.py
"""

import torch
from attention_backends.integrations.diffusers import attention_backend
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel


def tiny_pipeline() -> WanPipeline:
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler()
    return WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=transformer)


def main() -> str:
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    config = {"per_role": {"self": {"backend": "custom_sparse_attn", "extra": {"topk": 0.5}}}}
    with attention_backend(pipe, config) as chosen:
        pipe(
            prompt_embeds=torch.zeros(1, 7, 16), negative_prompt_embeds=torch.zeros(1, 7, 16), height=128, width=128,
            num_frames=13, num_inference_steps=3, output_type="latent",
        )  # fmt: skip
        return chosen.summary()


if __name__ == "__main__":
    print(main())
