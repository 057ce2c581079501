"""The shipped workflows of real models: `FAMILY_WORKFLOWS[name]()` builds each as a graph.

File names, loaders, samplers and shifts are those of ComfyUI's own templates; prompt, seed, sizes, frames and steps
those of the published end-to-end comparison of attention backends that they repeat.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from workflow_graphs import SEED, USUAL, Graph, Link, branches, custom_sampler, ksampler, output

PROMPT = "A dog running across a field of golden wheat."
OTHERS = ("torch_sdpa", "sage_attn_3", "flash_attn")
Backends = tuple[str, ...]


def start(model: str, facts: str, *files: str) -> Graph:
    """A graph whose note says what runs and which files it needs."""
    needed = "\n".join(f"- `models/{file}`" for file in files)
    graph = Graph(
        f"**{model}**, {facts}: the same prompt and seed with three attention backends, then pictures, differences "
        "and the time of the diffusion stage. Where a backend cannot run, that branch falls back, and the comparison "
        "says so and shows no speed-up. The first run loads and compiles, so its times say little: change the seed, in "
        "every branch that has one, and queue again. With the same seed ComfyUI shows what it has kept, and nothing is "
        f"sampled.\n\n{needed}"
    )
    graph.files = files
    return graph


def unet(graph: Graph, name: str, title: str = "") -> Link:
    return graph.add("UNETLoader", title, unet_name=name, weight_dtype="default")


def prompts(graph: Graph, clip: Link) -> dict[str, Link]:
    positive = graph.add("CLIPTextEncode", "Prompt", text=PROMPT, clip=clip)
    return {"positive": positive, "negative": graph.add("CLIPTextEncode", "Negative prompt", text="", clip=clip)}


def clip_loader(graph: Graph, name: str, kind: str) -> Link:
    return graph.add("CLIPLoader", clip_name=name, type=kind, device="default")


def vae_decode(graph: Graph, vae: Link) -> Callable[[Link], Link]:
    return lambda samples: graph.add("VAEDecode", samples=samples, vae=vae)


def hunyuan_video_15(backends: Backends) -> Graph:
    model_name, vae_name = "hunyuanvideo1.5_480p_t2v_fp16.safetensors", "hunyuanvideo15_vae_fp16.safetensors"
    clips = "qwen_2.5_vl_7b_fp8_scaled.safetensors", "byt5_small_glyphxl_fp16.safetensors"
    graph = start(
        "HunyuanVideo 1.5", "832x480, 33 frames, 50 steps", f"diffusion_models/{model_name}",
        *(f"text_encoders/{clip}" for clip in clips), f"vae/{vae_name}",
    )  # fmt: skip
    # 480p has a shift of 5 (README of HunyuanVideo-1.5, optimal configurations); ComfyUI's template, 720p, has 7.
    model = graph.add("ModelSamplingSD3", model=unet(graph, model_name), shift=5.0)
    clip = graph.add(
        "DualCLIPLoader", clip_name1=clips[0], clip_name2=clips[1], type="hunyuan_video_15", device="default"
    )
    conditions, vae = prompts(graph, clip), graph.add("VAELoader", vae_name=vae_name)
    latent = graph.add("EmptyHunyuanVideo15Latent", width=832, height=480, length=33, batch_size=1)
    sigmas = graph.add("BasicScheduler", model=model, scheduler="simple", steps=50, denoise=1.0)
    sample = custom_sampler(graph, sigmas, latent)

    def branch(backend: str) -> Link:
        return sample(graph.add("CFGGuider", model=graph.selector(model, backend), cfg=6.0, **conditions))

    return branches(graph, backends, branch, vae_decode(graph, vae))


def wan22_14b(backends: Backends) -> Graph:
    high, low = (f"wan2.2_t2v_{noise}_noise_14B_fp8_scaled.safetensors" for noise in ("high", "low"))
    clip_name, vae_name = "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan_2.1_vae.safetensors"
    graph = start(
        "Wan 2.2 14B", "832x480, 33 frames, 40 steps", f"diffusion_models/{high}", f"diffusion_models/{low}",
        f"text_encoders/{clip_name}", f"vae/{vae_name}",
    )  # fmt: skip
    high_model = graph.add("ModelSamplingSD3", model=unet(graph, high, "High noise model"), shift=5.0)
    low_model = graph.add("ModelSamplingSD3", model=unet(graph, low, "Low noise model"), shift=5.0)
    settings: dict[str, Any] = prompts(graph, clip_loader(graph, clip_name, "wan"))
    settings |= {"sampler_name": "euler", "scheduler": "simple", "steps": 40, "cfg": 3.5, "noise_seed": SEED}
    vae = graph.add("VAELoader", vae_name=vae_name)
    latent = graph.add("EmptyHunyuanLatentVideo", width=832, height=480, length=33, batch_size=1)

    def branch(backend: str) -> Link:
        noisy = graph.add(
            "KSamplerAdvanced", "High noise", model=graph.selector(high_model, backend), latent_image=latent,
            add_noise="enable", start_at_step=0, end_at_step=20, return_with_leftover_noise="enable", **settings,
        )  # fmt: skip
        return graph.add(
            "KSamplerAdvanced", "Low noise", model=graph.selector(low_model, backend), latent_image=noisy,
            add_noise="disable", start_at_step=20, end_at_step=40, return_with_leftover_noise="disable", **settings,
        )  # fmt: skip

    return branches(graph, backends, branch, vae_decode(graph, vae))


def wan22_5b(backends: Backends) -> Graph:
    model_name, clip_name = "wan2.2_ti2v_5B_fp16.safetensors", "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    vae_name = "wan2.2_vae.safetensors"
    graph = start(
        "Wan 2.2 5B", "1280x704, 49 frames, 30 steps", f"diffusion_models/{model_name}",
        f"text_encoders/{clip_name}", f"vae/{vae_name}",
    )  # fmt: skip
    model = graph.add("ModelSamplingSD3", model=unet(graph, model_name), shift=8.0)
    settings: dict[str, Any] = prompts(graph, clip_loader(graph, clip_name, "wan"))
    vae = graph.add("VAELoader", vae_name=vae_name)
    latent = graph.add("Wan22ImageToVideoLatent", vae=vae, width=1280, height=704, length=49, batch_size=1)
    settings |= {"latent_image": latent, "steps": 30, "cfg": 5.0, "sampler_name": "uni_pc", "scheduler": "simple"}

    def branch(backend: str) -> Link:
        return ksampler(graph, graph.selector(model, backend), **settings)

    return branches(graph, backends, branch, vae_decode(graph, vae))


def qwen_image(backends: Backends) -> Graph:
    model_name, clip_name = "qwen_image_fp8_e4m3fn.safetensors", "qwen_2.5_vl_7b_fp8_scaled.safetensors"
    vae_name = "qwen_image_vae.safetensors"
    graph = start(
        "Qwen-Image", "1024x1024, 50 steps", f"diffusion_models/{model_name}", f"text_encoders/{clip_name}",
        f"vae/{vae_name}",
    )  # fmt: skip
    model = graph.add("ModelSamplingAuraFlow", model=unet(graph, model_name), shift=3.1)
    settings: dict[str, Any] = prompts(graph, clip_loader(graph, clip_name, "qwen_image"))
    vae = graph.add("VAELoader", vae_name=vae_name)
    latent = graph.add("EmptySD3LatentImage", width=1024, height=1024, batch_size=1)
    settings |= {"latent_image": latent, "steps": 50, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple"}

    def branch(backend: str) -> Link:
        return ksampler(graph, graph.selector(model, backend), **settings)

    return branches(graph, backends, branch, vae_decode(graph, vae))


def flux2_dev(backends: Backends) -> Graph:
    model_name, clip_name = "flux2_dev_fp8mixed.safetensors", "mistral_3_small_flux2_bf16.safetensors"
    vae_name = "flux2-vae.safetensors"
    graph = start(
        "FLUX.2-dev", "1024x1024, 50 steps", f"diffusion_models/{model_name}", f"text_encoders/{clip_name}",
        f"vae/{vae_name}",
    )  # fmt: skip
    model = unet(graph, model_name)
    text = graph.add("CLIPTextEncode", "Prompt", text=PROMPT, clip=clip_loader(graph, clip_name, "flux2"))
    conditioning = graph.add("FluxGuidance", conditioning=text, guidance=4.0)
    vae = graph.add("VAELoader", vae_name=vae_name)
    latent = graph.add("EmptyFlux2LatentImage", width=1024, height=1024, batch_size=1)
    sample = custom_sampler(graph, graph.add("Flux2Scheduler", steps=50, width=1024, height=1024), latent)

    def branch(backend: str) -> Link:
        return sample(graph.add("BasicGuider", model=graph.selector(model, backend), conditioning=conditioning))

    return branches(graph, backends, branch, vae_decode(graph, vae))


def ltx2(backends: Backends) -> Graph:
    checkpoint, encoder = "ltx-2-19b-dev-fp8.safetensors", "gemma_3_12B_it_fp4_mixed.safetensors"
    graph = start("LTX-2", "832x480, 33 frames with sound, 40 steps", f"checkpoints/{checkpoint}",
                 f"text_encoders/{encoder}")  # fmt: skip
    model = graph.add("CheckpointLoaderSimple", ckpt_name=checkpoint)
    clip = graph.add("LTXAVTextEncoderLoader", text_encoder=encoder, ckpt_name=checkpoint, device="default")
    positive = graph.add("LTXVConditioning", frame_rate=24.0, **prompts(graph, clip))
    video = graph.add("EmptyLTXVLatentVideo", width=832, height=480, length=33, batch_size=1)
    audio_vae = graph.add("LTXVAudioVAELoader", ckpt_name=checkpoint)
    audio = graph.add("LTXVEmptyLatentAudio", frames_number=33, frame_rate=24.0, batch_size=1, audio_vae=audio_vae)
    latent = graph.add("LTXVConcatAVLatent", video_latent=video, audio_latent=audio)
    sigmas = graph.add(
        "LTXVScheduler", steps=40, max_shift=2.05, base_shift=0.95, stretch=True, terminal=0.1, latent=latent
    )
    sample = custom_sampler(graph, sigmas, latent)

    def branch(backend: str) -> Link:
        given = {"positive": positive, "negative": output(positive, 1), "cfg": 4.0}
        return sample(graph.add("CFGGuider", model=graph.selector(model, backend), **given))

    def decode(samples: Link) -> Link:
        picture = graph.add("LTXVSeparateAVLatent", av_latent=samples)
        return graph.add("VAEDecode", samples=picture, vae=output(model, 2))

    return branches(graph, backends, branch, decode)


FAMILIES: dict[str, Callable[[Backends], Graph]] = {
    "hunyuan_video_15": hunyuan_video_15,
    "wan22_14b": wan22_14b,
    "wan22_5b": wan22_5b,
    "qwen_image": qwen_image,
    "flux2_dev": flux2_dev,
    "ltx2": ltx2,
}

FAMILY_WORKFLOWS: dict[str, Callable[[], Graph]] = {
    **{f"compare_{family}": partial(build, USUAL) for family, build in FAMILIES.items()},
    **{f"compare_{family}_sage3_flash": partial(build, OTHERS) for family, build in FAMILIES.items()},
}
