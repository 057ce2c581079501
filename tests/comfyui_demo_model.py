"""Run the embedded model inside ComfyUI: python comfyui_demo_model.py COMFYUI WEIGHTS INPUTS OUTPUTS

A process of its own, because ComfyUI reads its command line when it is imported. It knows nothing of the
pack: it loads the weights as the stock UNETLoader does, and saves what ComfyUI computes from the inputs.
"""

import sys

import torch
from safetensors.torch import load_file, save_file


def main(comfyui: str, weights: str, inputs: str, outputs: str) -> None:
    sys.path.insert(0, comfyui)
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management
    import comfy.sample
    import comfy.samplers
    import comfy.sd

    given = load_file(inputs)
    patcher = comfy.sd.load_diffusion_model(weights, model_options={})
    comfy.model_management.load_models_gpu([patcher])
    sampling = patcher.get_model_object("model_sampling")
    network, latent_format = patcher.model.diffusion_model, patcher.model.latent_format
    positive, negative = ([[given[name], {}]] for name in ("positive", "negative"))
    with torch.inference_mode():
        empty = torch.zeros_like(given["noise"])
        found = {
            "flow": network(given["x"], given["timestep"], context=given["context"]),
            "sigmas": comfy.samplers.calculate_sigmas(sampling, "simple", 20),
            "sample": comfy.sample.sample(
                patcher,
                given["noise"],
                20,
                4.0,
                "euler",
                "simple",
                positive,
                negative,
                empty,
                seed=0,
                disable_pbar=True,
            ),
            "mean": latent_format.latents_mean.flatten(),
            "std": latent_format.latents_std.flatten(),
            "rgb_factors": torch.tensor(latent_format.latent_rgb_factors),
            "rgb_bias": torch.tensor(latent_format.latent_rgb_factors_bias),
        }
    dtype = next(network.parameters()).dtype
    print(f"class {type(network).__module__}.{type(network).__name__}, dtype {dtype}")
    save_file({name: value.clone().contiguous() for name, value in found.items()}, outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
