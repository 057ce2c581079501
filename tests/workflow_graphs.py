"""Graphs in ComfyUI's API form, built in a few lines, and those of the embedded model.

`workflow_families.py` has those of real models; `make_workflows.py` writes the files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

SEED = 42
USUAL = ("torch_sdpa", "cudnn_attn", "sage_attn")
Link = list[Any]


class Graph:
    """Nodes in API form, each in a column; from the top of a column in the order in which they were added."""

    def __init__(self, about: str = "") -> None:
        self.about = about
        """One or two sentences, Markdown, for the note below the loaders."""
        self.nodes: dict[str, dict[str, Any]] = {}
        self.columns: dict[str, int] = {}
        self.folded: list[str] = []
        """Nodes that show their title alone."""
        self.fixed: list[str] = []
        """Nodes whose seed stays as it is; another draws a new one after each run, so that nothing is from a cache."""
        self.models: dict[str, list[dict[str, str]]] = {}
        """The files that a loader needs, as ComfyUI's own templates name them: the front end offers to get them."""
        self.column = 0

    @property
    def files(self) -> list[str]:
        """Model files it needs, as paths in the models folder."""
        return sorted({f"{file['directory']}/{file['name']}" for files in self.models.values() for file in files})

    def add(self, kind: str, title: str = "", **inputs: Any) -> Link:
        """A node in the current column; the answer is a link to its first output."""
        number = str(len(self.nodes) + 1)
        self.nodes[number] = {"class_type": kind, "inputs": inputs}
        if title:
            self.nodes[number]["_meta"] = {"title": title}
        self.columns[number] = self.column
        return [number, 0]

    def fold(self, kind: str, title: str = "", **inputs: Any) -> Link:
        """As `add`, for a node that nobody needs to look into."""
        link = self.add(kind, title, **inputs)
        self.folded.append(link[0])
        return link

    def load(self, kind: str, title: str = "", *, files: Mapping[str, str], **inputs: Any) -> Link:
        """A loader and the files that it needs: path in the models folder -> address."""
        link = self.add(kind, title, **inputs)
        parts = [(*path.rsplit("/", 1), address) for path, address in files.items()]
        self.models[link[0]] = [{"name": name, "url": url, "directory": folder} for folder, name, url in parts]
        return link

    def selector(self, model: Link, backend: str, title: str = "", **settings: Any) -> Link:
        usual: dict[str, Any] = {"accuracy": "exact", "strict": False, "guard": "off", "recommended": False}
        usual["extra"] = ""
        return self.add("AttentionBackendSelector", title, model=model, backend=backend, **usual | settings)


def output(link: Link, number: int) -> Link:
    """Another output of the node that a link comes from."""
    return [link[0], number]


def branches(
    graph: Graph, backends: tuple[str, ...], sample: Callable[[str], Link], decode: Callable[[Link], Link]
) -> Graph:
    """For each backend a sampler, its report and its picture; then one comparison of all."""
    first = graph.column
    # Without a label the comparison writes what was asked for and what really ran.
    compared: dict[str, Any] = {f"label_{number}": "" for number in range(1, 7)}
    for number, backend in enumerate(backends, start=1):
        graph.column = first
        samples = sample(backend)
        graph.column += 1
        report = graph.fold("AttentionReport", samples=samples)
        compared |= {f"image_{number}": decode(report), f"report_{number}": output(report, 2)}
    graph.column += 1
    comparison = graph.fold("AttentionComparison", **compared)
    graph.add("PreviewImage", images=comparison)
    graph.add("PreviewAny", "Table", source=output(comparison, 1))
    return graph


def shared_seed(graph: Graph) -> Link:
    """One seed for all branches, new in each run: with a seed that stays ComfyUI takes the pictures from its cache."""
    return graph.add("PrimitiveInt", "Seed of all branches", value=SEED)


def ksampler(graph: Graph, model: Link, **inputs: Any) -> Link:
    return graph.add("KSampler", model=model, **{"seed": SEED, "denoise": 1.0, **inputs})


def custom_sampler(graph: Graph, sigmas: Link, latent: Link) -> Callable[[Link], Link]:
    """Samplers that share noise, sampler and sigmas; each takes its own guider."""
    shared = {
        "noise": graph.add("RandomNoise", noise_seed=SEED),
        "sampler": graph.add("KSamplerSelect", sampler_name="euler"),
    }
    return lambda guider: graph.add(
        "SamplerCustomAdvanced", guider=guider, sigmas=sigmas, latent_image=latent, **shared
    )


def embedded(graph: Graph) -> tuple[Link, dict[str, Any]]:
    """The model that comes with the pack, and what a sampler of it takes."""
    model = graph.add(
        "UNETLoader", "Embedded demo model", unet_name="tiny_shapes_wan_fp16.safetensors", weight_dtype="default"
    )
    return model, {
        "positive": graph.add("TinyShapesCaption", caption="a large red circle on the left"),
        "negative": graph.add("TinyShapesCaption", "Negative (empty)", caption=""),
        "latent_image": graph.add("EmptyHunyuanLatentVideo", width=256, height=256, length=1, batch_size=1),
    }


EMBEDDED = {"steps": 20, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple"}


def reported(graph: Graph, samples: Link) -> Graph:
    """The picture that was sampled, and what ran."""
    graph.column += 1
    report = graph.fold("AttentionReport", samples=samples)
    picture = graph.fold("TinyShapesImage", samples=report, scale=16)
    graph.column += 1
    graph.add("PreviewImage", images=picture)
    graph.add("PreviewAny", "What ran", source=output(report, 1))
    return graph


def per_role() -> Graph:
    graph = Graph(
        "One backend for the whole model, another for its cross-attention. *What ran* shows both. Runs anywhere: the "
        "model comes with the pack."
    )
    model, settings = embedded(graph)
    graph.column = 1
    model = graph.selector(model, "torch_sdpa")
    model = graph.add("PerRoleAttentionConfig", model=model, role="cross", backend="sdpa_math", extra="")
    graph.column = 2
    return reported(graph, ksampler(graph, model, **settings, **EMBEDDED))


def compare_node() -> Graph:
    graph = Graph(
        "Several backends, the same noise, each warmed up: pictures, times and differences. Runs anywhere: the model "
        "comes with the pack."
    )
    model, settings = embedded(graph)
    graph.column = 1
    settings |= {
        "noise": graph.add("RandomNoise", noise_seed=SEED),
        "sampler": graph.add("KSamplerSelect", sampler_name="euler"),
        "sigmas": graph.add("BasicScheduler", model=model, scheduler="simple", steps=20, denoise=1.0),
    }
    backends = "torch_sdpa, sdpa_math, emulated_int8, cudnn_attn, sage_attn"
    return compared(graph, model, backends, cfg=4.0, **settings)


def compared(graph: Graph, model: Link, backends: str, **settings: Any) -> Graph:
    """One node that samples with each backend, its picture and its table."""
    graph.column += 1
    compare = graph.add("AttentionCompare", model=model, backends=backends, mode="end_to_end", repeat=1, **settings)
    graph.column += 1
    graph.add("PreviewImage", images=output(compare, 1))
    graph.add("PreviewAny", "Table", source=output(compare, 2))
    return graph


def compare_by_hand() -> Graph:
    graph = Graph(
        "Same model, prompt and seed; only the backend differs. The first run of a backend is slower than the next: "
        "run it again, each run draws a new seed."
    )
    model, settings = embedded(graph)
    settings["seed"] = shared_seed(graph)
    graph.column = 1
    models = {backend: graph.selector(model, backend) for backend in USUAL}
    graph.column = 2
    return branches(
        graph, USUAL,
        lambda backend: ksampler(graph, models[backend], **settings, **EMBEDDED),
        lambda latent: graph.fold("TinyShapesImage", samples=latent, scale=16),
    )  # fmt: skip


def schedule() -> Graph:
    graph = Graph(
        "A fast kernel between, an exact one for the first and last steps. *emulated_int8* stands for one such as "
        "*sage_attn* and runs anywhere: the model comes with the pack."
    )
    model, settings = embedded(graph)
    graph.column = 1
    model = graph.selector(model, "emulated_int8")
    window = {"when": "precise first and last N", "window": "2", "blocks": "", "role": "", "extra": ""}
    model = graph.add("AttentionSchedule", model=model, backend="torch_sdpa", **window)
    graph.column = 2
    return reported(graph, ksampler(graph, model, **settings, **EMBEDDED))


def text_and_record() -> Graph:
    graph = Graph(
        "Settings as text, and a record of what ran in the saved picture. Paste the record in place of the text: with "
        "the same seed the picture is the same."
    )
    model, settings = embedded(graph)
    graph.column = 1
    text = "default: torch_sdpa\nper_role:\n  cross: sdpa_math\n"
    model = graph.add("AttentionConfigText", model=model, text=text, file="none", component="transformer")
    graph.column = 2
    sampled = ksampler(graph, model, **settings, **EMBEDDED)
    graph.fixed = [sampled[0]]
    graph.column = 3
    picture = graph.fold("TinyShapesImage", samples=sampled, scale=16)
    record = graph.add("AttentionRecord", value=picture)
    graph.column = 4
    graph.add("SaveImage", images=record, filename_prefix="attention_record")
    graph.add("PreviewAny", "Record", source=output(record, 1))
    return graph


def clip() -> Graph:
    graph = Graph(
        "One seed, dense and sparse: *sparge_attn* computes a quarter of the blocks. Both clips are saved, and *What "
        "ran* shows the share kept. *Attention Over GPUs* changes nothing with one GPU. Runs anywhere: the model "
        "comes with the pack."
    )
    model = graph.add(
        "UNETLoader", "Embedded video model", unet_name="tiny_motion_wan_fp16.safetensors", weight_dtype="default"
    )
    caption = "a medium red circle moving right fast from the left"
    settings = {
        "positive": graph.add("TinyShapesCaption", caption=caption),
        "negative": graph.add("TinyShapesCaption", "Negative (empty)", caption=""),
        "latent_image": graph.add("EmptyHunyuanLatentVideo", width=256, height=256, length=29, batch_size=1),
        "seed": shared_seed(graph),
    }
    graph.column = 1
    model = graph.add("AttentionOverGPUs", model=model, devices="all")
    models = {
        "dense": graph.selector(model, "torch_sdpa", "Dense"),
        "sparse": graph.selector(model, "sparge_attn", "Sparse", extra="topk=0.25"),
    }
    for name, chosen in models.items():
        graph.column = 2
        samples = ksampler(graph, chosen, **settings, **EMBEDDED)
        graph.column = 3
        report = graph.fold("AttentionReport", samples=samples)
        frames = graph.fold("TinyShapesImage", samples=report, scale=12)
        graph.column = 4
        film = {"fps": 6.0, "lossless": True, "quality": 80, "method": "default"}
        graph.add("SaveAnimatedWEBP", f"Clip, {name}", images=frames, filename_prefix=f"clip_{name}", **film)
        if name == "sparse":
            graph.add("PreviewAny", "What ran", source=output(report, 1))
    return graph


def benchmark() -> Graph:
    graph = Graph(
        "Times the attention of HunyuanVideo 1.5 with each kernel; no model is needed. 256 tokens are for a CPU: on a "
        "GPU set *tokens* to 0, the full lengths."
    )
    measured = graph.add(
        "AttentionBenchmark", presets="hv15", tokens=256, masked="both", backends="", dtype="bfloat16", seed=0
    )
    graph.fixed = [measured[0]]
    graph.column = 1
    graph.add("PreviewAny", "Table", source=measured)
    return graph


EMBEDDED_WORKFLOWS: dict[str, Callable[[], Graph]] = {
    "compare_sdpa_cudnn_sage": compare_by_hand,
    "compare_node": compare_node,
    "per_role": per_role,
    "schedule": schedule,
    "text_and_record": text_and_record,
    "clip": clip,
    "benchmark": benchmark,
}
"""These run on any machine."""
