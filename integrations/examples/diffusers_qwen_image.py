"""Qwen-Image in Diffusers with tiny random weights: a padded batch, and a run that repeats another one's record.

    python integrations/examples/diffusers_qwen_image.py

The record is plain data: store it as JSON beside the picture, and apply it later to get the same decisions.
"""

import torch
from attention_backends.integrations.diffusers import apply, reset
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel


def tiny_pipeline() -> QwenImagePipeline:
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    return QwenImagePipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **parts)


def main() -> str:
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False  # the second prompt has 4 tokens
    request = {
        "prompt_embeds": torch.zeros(2, 7, 16), "prompt_embeds_mask": mask, "true_cfg_scale": 1.0, "height": 64,
        "width": 64, "num_inference_steps": 3, "output_type": "latent",
    }  # fmt: skip
    applied = apply(pipe, {"default": "sdpa_math", "schedule": [{"backend": "torch_sdpa", "steps": "0"}]})
    pipe(**request)
    repeated = apply(pipe, applied.record())
    pipe(**request)
    summary = repeated.summary()
    reset(pipe)
    return summary


if __name__ == "__main__":
    print(main())
