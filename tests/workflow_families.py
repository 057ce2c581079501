"""The workflows of real models: those that are shipped, and those that `benchmarks/end_to_end.py` runs.

Files, loaders, samplers, steps and shifts are those of ComfyUI's own templates, which a test reads where they are
installed. The graphs of the benchmark have prompt, seed, sizes, frames and steps of the published end-to-end comparison
of attention backends that they repeat.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from workflow_graphs import SEED, USUAL, Graph, Link, branches, compared, ksampler, output, shared_seed

PROMPT = "A dog running across a field of golden wheat."
NEGATIVE = "overexposed, static, blurry details, subtitles, worst quality, JPEG artifacts, deformed, extra fingers"
HUB = "https://huggingface.co/"
WAN22 = HUB + "Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files/"
QWEN = HUB + "Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files/"
LTX2 = HUB + "Lightricks/LTX-2/resolve/main/"
WAN_CLIP = (
    HUB + "Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/"
    "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors"
)
FASTER = {"accuracy": "quantized", "guard": "watch", "recommended": True}
"""`auto` may take SageAttention where it is installed; what is known to go wrong with this model stays exact."""
CHOOSE = (
    "**Attention Backend Selector** is what ComfyUI's template does not have. *auto* takes SageAttention where it is "
    "installed; the line on the node says what runs here."
)


def file_of(address: str) -> tuple[str, str]:
    """Name of a file and its path in the models folder, from an address that ends in the path."""
    folder, name = address.split("/")[-2:]
    return name, f"{folder}/{name}"


def loader(graph: Graph, kind: str, entry: str, address: str, folder: str = "", title: str = "", **more: Any) -> Link:
    """A loader of one file, by the name of its input."""
    name, path = file_of(address)
    return graph.load(kind, title, files={f"{folder}/{name}" if folder else path: address}, **{entry: name}, **more)


def unet(graph: Graph, address: str, title: str = "", folder: str = "") -> Link:
    return loader(graph, "UNETLoader", "unet_name", address, folder, title, weight_dtype="default")


def clip_loader(graph: Graph, address: str, kind: str) -> Link:
    return loader(graph, "CLIPLoader", "clip_name", address, type=kind, device="default")


def vae_loader(graph: Graph, address: str) -> Link:
    return loader(graph, "VAELoader", "vae_name", address)


def lora(graph: Graph, model: Link, address: str, folder: str = "", title: str = "") -> Link:
    more = {"model": model, "strength_model": 1.0}
    return loader(graph, "LoraLoaderModelOnly", "lora_name", address, folder, title, **more)


def prompts(graph: Graph, clip: Link, negative: str = "") -> dict[str, Link]:
    positive = graph.add("CLIPTextEncode", "Prompt", text=PROMPT, clip=clip)
    return {"positive": positive, "negative": graph.add("CLIPTextEncode", "Negative prompt", text=negative, clip=clip)}


def saved_video(graph: Graph, images: Link, fps: float, **more: Any) -> Graph:
    video = graph.fold("CreateVideo", images=images, fps=fps, bit_depth=8, **more)
    kept = {"format": "auto", "format.codec": "auto", "codec": "auto"}
    graph.add("SaveVideo", video=video, filename_prefix="video/ComfyUI", **kept)
    return graph


def wan22_14b(steps: int, split: int, cfg: float, distilled: bool) -> Graph:
    graph = Graph(CHOOSE)
    high = unet(graph, WAN22 + "diffusion_models/wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "High noise model")
    low = unet(graph, WAN22 + "diffusion_models/wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors", "Low noise model")
    clip = clip_loader(graph, WAN_CLIP, "wan")
    graph.column = 1
    selected = graph.selector(high, "auto", **FASTER, model_2=low)
    models = {"high": selected, "low": output(selected, 1)}
    settings: dict[str, Any] = prompts(graph, clip, NEGATIVE)
    graph.column = 2
    for noise, model in models.items():
        if distilled:
            name = f"loras/wan2.2_t2v_lightx2v_4steps_lora_v1.1_{noise}_noise.safetensors"
            model = lora(graph, model, WAN22 + name, title=f"4 steps ({noise} noise)")
        models[noise] = graph.add("ModelSamplingSD3", f"Shift ({noise} noise)", model=model, shift=5.0)
    latent = graph.add("EmptyHunyuanLatentVideo", width=640, height=640, length=81, batch_size=1)
    graph.column = 3
    settings |= {"sampler_name": "euler", "scheduler": "simple", "steps": steps, "cfg": cfg}
    noisy = graph.add(
        "KSamplerAdvanced", "High noise", model=models["high"], latent_image=latent, noise_seed=SEED,
        add_noise="enable", start_at_step=0, end_at_step=split, return_with_leftover_noise="enable", **settings,
    )  # fmt: skip
    samples = graph.add(
        "KSamplerAdvanced", "Low noise", model=models["low"], latent_image=noisy, noise_seed=0,
        add_noise="disable", start_at_step=split, end_at_step=steps, return_with_leftover_noise="disable", **settings,
    )  # fmt: skip
    graph.fixed = [samples[0]]  # it adds no noise
    graph.column = 4
    vae = vae_loader(graph, WAN22 + "vae/wan_2.1_vae.safetensors")
    return saved_video(graph, graph.fold("VAEDecode", samples=samples, vae=vae), 16.0)


def wan22_14b_4_steps() -> Graph:
    return wan22_14b(steps=4, split=2, cfg=1.0, distilled=True)


def wan22_14b_20_steps() -> Graph:
    return wan22_14b(steps=20, split=10, cfg=3.5, distilled=False)


def qwen_image_parts(graph: Graph, seed: Link) -> tuple[Link, dict[str, Any]]:
    """Model and what its sampler takes; loaders and seed in the first column, prompts and latent in the second."""
    model = unet(graph, QWEN + "diffusion_models/qwen_image_fp8_e4m3fn.safetensors")
    clip = clip_loader(graph, QWEN + "text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors", "qwen_image")
    graph.column = 1
    shifted = graph.add("ModelSamplingAuraFlow", model=model, shift=3.1)
    settings: dict[str, Any] = {**prompts(graph, clip), "seed": seed}
    settings["latent_image"] = graph.add("EmptySD3LatentImage", width=1328, height=1328, batch_size=1)
    return shifted, settings | {"steps": 20, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple"}


def qwen_image() -> Graph:
    graph = Graph(CHOOSE)
    model = unet(graph, QWEN + "diffusion_models/qwen_image_fp8_e4m3fn.safetensors")
    clip = clip_loader(graph, QWEN + "text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors", "qwen_image")
    graph.column = 1
    model = graph.selector(model, "auto", **FASTER)
    settings: dict[str, Any] = prompts(graph, clip)
    graph.column = 2
    model = graph.add("ModelSamplingAuraFlow", model=model, shift=3.1)
    latent = graph.add("EmptySD3LatentImage", width=1328, height=1328, batch_size=1)
    settings |= {"latent_image": latent, "steps": 20, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple"}
    graph.column = 3
    samples = ksampler(graph, model, **settings)
    graph.column = 4
    vae = vae_loader(graph, QWEN + "vae/qwen_image_vae.safetensors")
    graph.add("SaveImage", images=graph.fold("VAEDecode", samples=samples, vae=vae), filename_prefix="Qwen-Image")
    return graph


def flux_dev() -> Graph:
    graph = Graph(CHOOSE)
    model = unet(graph, HUB + "Comfy-Org/flux1-dev/resolve/main/flux1-dev.safetensors", folder="diffusion_models")
    encoders = ("clip_l.safetensors", "t5xxl_fp16.safetensors")
    addresses = {
        f"text_encoders/{name}": f"{HUB}comfyanonymous/flux_text_encoders/resolve/main/{name}" for name in encoders
    }
    names = {"clip_name1": encoders[0], "clip_name2": encoders[1]}
    clip = graph.load("DualCLIPLoader", files=addresses, **names, type="flux", device="default")
    graph.column = 1
    model = graph.selector(model, "auto", **FASTER)
    prompt = graph.add("CLIPTextEncode", "Prompt", text=PROMPT, clip=clip)
    graph.column = 2
    nothing = graph.fold("ConditioningZeroOut", conditioning=prompt)
    latent = graph.add("EmptySD3LatentImage", width=1024, height=1024, batch_size=1)
    graph.column = 3
    samples = ksampler(
        graph, model, positive=prompt, negative=nothing, latent_image=latent,
        steps=20, cfg=1.0, sampler_name="euler", scheduler="simple",
    )  # fmt: skip
    graph.column = 4
    vae = vae_loader(graph, HUB + "Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors")
    graph.add("SaveImage", images=graph.fold("VAEDecode", samples=samples, vae=vae), filename_prefix="flux_dev")
    return graph


def ltx2() -> Graph:
    """Both stages of ComfyUI's template: 640x352, then upscaled to twice that and sampled again in 3 steps."""
    graph, checkpoint = Graph(CHOOSE), LTX2 + "ltx-2-19b-dev-fp8.safetensors"
    gemma = HUB + "Comfy-Org/ltx-2/resolve/main/split_files/text_encoders/gemma_3_12B_it_fp4_mixed.safetensors"
    weights, frames = "checkpoints", {"batch_size": 1}
    model = loader(graph, "CheckpointLoaderSimple", "ckpt_name", checkpoint, weights)
    vae = output(model, 2)
    name, _ = file_of(checkpoint)
    clip = loader(graph, "LTXAVTextEncoderLoader", "text_encoder", gemma, ckpt_name=name, device="default")
    audio_vae = loader(graph, "LTXVAudioVAELoader", "ckpt_name", checkpoint, weights)
    upscaler = loader(
        graph, "LatentUpscaleModelLoader", "model_name", LTX2 + "ltx-2-spatial-upscaler-x2-1.0.safetensors",
        "latent_upscale_models",
    )  # fmt: skip
    graph.column = 1
    model = graph.selector(model, "auto", **FASTER)
    texts = prompts(graph, clip, "blurry, low quality, still frame, watermark, subtitles")
    distilled = lora(graph, model, LTX2 + "ltx-2-19b-distilled-lora-384.safetensors", "loras", "Second stage")
    graph.column = 2
    given = graph.add("LTXVConditioning", frame_rate=24.0, **texts)
    conditions = {"positive": given, "negative": output(given, 1)}
    video = graph.add("EmptyLTXVLatentVideo", width=640, height=352, length=121, **frames)
    audio = graph.add("LTXVEmptyLatentAudio", frames_number=121, frame_rate=24, audio_vae=audio_vae, **frames)
    latent = graph.add("LTXVConcatAVLatent", video_latent=video, audio_latent=audio)
    graph.column = 3
    noise = graph.add("RandomNoise", noise_seed=SEED)
    sampler = graph.add("KSamplerSelect", sampler_name="euler_ancestral")
    shift = {"max_shift": 2.05, "base_shift": 0.95, "stretch": True, "terminal": 0.1}
    sigmas = graph.add("LTXVScheduler", steps=20, latent=latent, **shift)
    guider = graph.add("CFGGuider", model=model, cfg=4.0, **conditions)
    taken = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas, "latent_image": latent}
    graph.column = 4
    first = graph.fold("SamplerCustomAdvanced", "First stage", **taken)
    parts = graph.fold("LTXVSeparateAVLatent", av_latent=first)
    cropped = graph.fold("LTXVCropGuides", latent=parts, **conditions)
    conditions = {"positive": cropped, "negative": output(cropped, 1)}
    larger = graph.fold("LTXVLatentUpsampler", samples=output(cropped, 2), upscale_model=upscaler, vae=vae)
    latent = graph.fold("LTXVConcatAVLatent", video_latent=larger, audio_latent=output(parts, 1))
    noise = graph.fold("RandomNoise", noise_seed=0)
    graph.fixed = [noise[0]]
    guider = graph.fold("CFGGuider", model=distilled, cfg=1.0, **conditions)
    sigmas = graph.fold("ManualSigmas", sigmas="0.909375, 0.725, 0.421875, 0.0")
    graph.column = 5
    taken |= {"noise": noise, "guider": guider, "sigmas": sigmas, "latent_image": latent}
    second = graph.fold("SamplerCustomAdvanced", "Second stage", **taken)
    parts = graph.fold("LTXVSeparateAVLatent", av_latent=output(second, 1))
    tiles = {"tile_size": 512, "overlap": 64, "temporal_size": 4096, "temporal_overlap": 8}
    images = graph.fold("VAEDecodeTiled", samples=parts, vae=vae, **tiles)
    sound = graph.fold("LTXVAudioVAEDecode", samples=output(parts, 1), audio_vae=audio_vae)
    return saved_video(graph, images, 24.0, audio=sound)


def compare_by_hand() -> Graph:
    graph = Graph(
        "Same model, prompt and seed; only the backend differs. The first run loads and compiles: read the times of "
        "the second; each run draws a new seed."
    )
    seed = shared_seed(graph)
    model, settings = qwen_image_parts(graph, seed)
    graph.column = 2
    models = {backend: graph.selector(model, backend) for backend in USUAL}
    graph.column = 3
    vae = vae_loader(graph, QWEN + "vae/qwen_image_vae.safetensors")
    return branches(
        graph, USUAL,
        lambda backend: ksampler(graph, models[backend], **settings),
        lambda samples: graph.fold("VAEDecode", samples=samples, vae=vae),
    )  # fmt: skip


def compare_wan22_5b() -> Graph:
    graph = Graph("Each backend is warmed up, then timed with the same noise. Put the names of yours into *backends*.")
    model = unet(graph, WAN22 + "diffusion_models/wan2.2_ti2v_5B_fp16.safetensors")
    clip = clip_loader(graph, WAN_CLIP, "wan")
    vae = vae_loader(graph, WAN22 + "vae/wan2.2_vae.safetensors")
    graph.column = 1
    model = graph.add("ModelSamplingSD3", model=model, shift=8.0)
    settings: dict[str, Any] = prompts(graph, clip, NEGATIVE)
    latent = graph.add("Wan22ImageToVideoLatent", vae=vae, width=1280, height=704, length=49, batch_size=1)
    graph.column = 2
    settings |= {
        "noise": graph.add("RandomNoise", noise_seed=SEED),
        "sampler": graph.add("KSamplerSelect", sampler_name="uni_pc"),
        "sigmas": graph.add("BasicScheduler", model=model, scheduler="simple", steps=20, denoise=1.0),
        "latent_image": latent,
    }
    return compared(graph, model, ", ".join(USUAL), cfg=5.0, vae=vae, **settings)


FAMILY_WORKFLOWS: dict[str, Callable[[], Graph]] = {
    "wan22_14b_4_steps": wan22_14b_4_steps,
    "wan22_14b_20_steps": wan22_14b_20_steps,
    "qwen_image": qwen_image,
    "flux_dev": flux_dev,
    "ltx2": ltx2,
    "compare_wan22_5b": compare_wan22_5b,
    "compare_qwen_image": compare_by_hand,
}
"""These need model files."""

TEMPLATES = {
    "wan22_14b_4_steps": "video_wan2_2_14B_t2v",
    "wan22_14b_20_steps": "video_wan2_2_14B_t2v",
    "qwen_image": "image_qwen_image",
    "flux_dev": "flux_dev_full_text_to_image",
    "ltx2": "video_ltx2_t2v",
}
"""ComfyUI's own template of each."""
