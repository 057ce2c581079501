"""Samples one caption of the embedded video model with dense and with sparse attention (run through with_package.py).

    python with_package.py make_films.py FOLDER

It writes an animated WebP of each and one of both beside each other, and prints how long each took.
"""

import math
import sys
from pathlib import Path
from time import perf_counter

import torch
from attention_backends.comparison.contenders import REFERENCE, Routed, router_for
from attention_backends.comparison.film import save_film
from attention_backends.comparison.scene import Scene, Settings, picture_of
from attention_backends.demo.model import VIDEO_WEIGHTS, load
from attention_backends.demo.motion import FRAMES

CAPTION = "a medium red circle moving right fast from the left on black"
SPARSE = "sparge_attn topk=0.25 dense_steps=4"
"""A quarter of the blocks, but in the first fifth of the steps, which decide the layout."""
SETTINGS = Settings(prompt=CAPTION, frames=FRAMES, steps=20)


def make_films(folder: Path, weights: Path = VIDEO_WEIGHTS, settings: Settings = SETTINGS) -> list[str]:
    """Write the films; a line for each with its time, and one that compares them."""
    router = router_for(settings.device)
    device = torch.device(settings.device or {"rocm": "cuda"}.get(router.platform.kind, router.platform.kind))
    scene = Scene(settings, device, load(weights))
    films, lines = [], [f'"{settings.prompt}", {settings.frames} frames, {settings.steps} steps:']
    folder.mkdir(parents=True, exist_ok=True)
    for name, backend in (("dense", REFERENCE), ("sparse", SPARSE)):
        attention = Routed(router, backend, scene.grid, guard="off")

        def on_step(index: int, latent: torch.Tensor, attention: Routed = attention) -> None:
            attention.at_step(index + 1, settings.steps)

        scene.sample(attention, steps=1)  # what is planned and compiled once counts for neither
        attention.attention_ms(device)
        attention.begin(scene.samples)
        attention.at_step(0, settings.steps)
        start = perf_counter()
        films.append(picture_of(scene.sample(attention, on_step).cpu()))
        seconds, inside = perf_counter() - start, attention.attention_ms(device)
        save_film(films[-1:], folder / f"film_{name}.webp")
        spent = "" if inside is None else f", {inside / 1e3:.1f} s of them in attention"
        lines.append(f"  {backend}: {seconds:.1f} s{spent}; film_{name}.webp")
    save_film(films, folder / "film_both.webp")
    error = float((films[1] - films[0]).square().mean())
    same = "the same frames" if error == 0 else f"PSNR {-10 * math.log10(error):.1f} dB"
    return [*lines, f"  sparse against dense: {same}; film_both.webp has dense on the left"]


if __name__ == "__main__":
    print("\n".join(make_films(Path(sys.argv[1]))))
