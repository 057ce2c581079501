"""Graphs in ComfyUI's API form, built in a few lines, and those of the embedded model.

`workflow_families.py` has those of real models; `make_workflows.py` writes the files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SEED = 42
USUAL = ("torch_sdpa", "cudnn_attn", "sage_attn")
Link = list[Any]


class Graph:
    """Nodes in API form, each in a lane: `model`, `branch 1`, `branch 2`, ... or `result`."""

    def __init__(self, about: str) -> None:
        self.about = about
        """What the workflow shows and what it needs, Markdown, for the note beside the nodes."""
        self.files: tuple[str, ...] = ()
        """Model files it needs, as paths in the models folder."""
        self.nodes: dict[str, dict[str, Any]] = {}
        self.lanes: dict[str, str] = {}
        self.lane = "model"

    def add(self, kind: str, title: str = "", **inputs: Any) -> Link:
        """A node in the current lane; the answer is a link to its first output."""
        number = str(len(self.nodes) + 1)
        self.nodes[number] = {"class_type": kind, "inputs": inputs}
        if title:
            self.nodes[number]["_meta"] = {"title": title}
        self.lanes[number] = self.lane
        return [number, 0]

    def selector(self, model: Link, backend: str, title: str = "") -> Link:
        settings: dict[str, Any] = {"accuracy": "exact", "strict": False, "guard": "off", "recommended": False}
        return self.add("AttentionBackendSelector", title, model=model, backend=backend, **settings)


def output(link: Link, number: int) -> Link:
    """Another output of the node that a link comes from."""
    return [link[0], number]


def branches(
    graph: Graph, backends: tuple[str, ...], sample: Callable[[str], Link], decode: Callable[[Link], Link]
) -> Graph:
    """For each backend a sampler, its report and its picture; then one comparison of all."""
    # Without a label the comparison writes what was asked for and what really ran.
    compared: dict[str, Any] = {f"label_{number}": "" for number in range(1, 7)}
    for number, backend in enumerate(backends, start=1):
        graph.lane = f"branch {number}: {backend}"
        report = graph.add("AttentionReport", samples=sample(backend))
        compared |= {f"image_{number}": decode(report), f"report_{number}": output(report, 2)}
    graph.lane = "result"
    comparison = graph.add("AttentionComparison", **compared)
    graph.add("PreviewImage", images=comparison)
    graph.add("PreviewAny", "Table", source=output(comparison, 1))
    return graph


def ksampler(graph: Graph, model: Link, **inputs: Any) -> Link:
    return graph.add("KSampler", model=model, seed=SEED, denoise=1.0, **inputs)


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
    report = graph.add("AttentionReport", samples=samples)
    graph.lane = "result"
    graph.add("PreviewImage", images=graph.add("TinyShapesImage", samples=report, scale=16))
    graph.add("PreviewAny", "What ran", source=output(report, 1))
    return graph


def per_role() -> Graph:
    graph = Graph(
        "**One backend for a whole model, another for its cross-attention.** The text on the right says what ran for "
        "each role, how often, and why not the backend that was asked for. Runs anywhere: the model comes with the "
        "pack."
    )
    model, settings = embedded(graph)
    graph.lane = "attention and sampling"
    model = graph.selector(model, "torch_sdpa")
    model = graph.add("PerRoleAttentionConfig", model=model, role="cross", backend="sdpa_math", extra="")
    return reported(graph, ksampler(graph, model, **settings, **EMBEDDED))


def compare_node() -> Graph:
    graph = Graph(
        "**Several backends, one node.** It samples the same noise once per backend, warmed up, and draws pictures, "
        "times and differences. A backend that cannot run here is a panel that says why. Runs anywhere: the model "
        "comes with the pack."
    )
    model, settings = embedded(graph)
    graph.lane = "sampling"
    settings |= {
        "noise": graph.add("RandomNoise", noise_seed=SEED),
        "sampler": graph.add("KSamplerSelect", sampler_name="euler"),
        "sigmas": graph.add("BasicScheduler", model=model, scheduler="simple", steps=20, denoise=1.0),
    }
    backends = "torch_sdpa, sdpa_math, emulated_int8, cudnn_attn, sage_attn"
    graph.lane = "result"
    compare = graph.add(
        "AttentionCompare", model=model, backends=backends, mode="end_to_end", repeat=1, cfg=4.0, **settings
    )
    graph.add("PreviewImage", images=output(compare, 1))
    graph.add("PreviewAny", "Table", source=output(compare, 2))
    return graph


def compare_by_hand() -> Graph:
    graph = Graph(
        "**Three branches, one picture.** Same model, prompt and seed; only the attention backend differs. Where a "
        "backend cannot run, that branch falls back, and the comparison says so. Runs anywhere: the model comes with "
        "the pack."
    )
    model, settings = embedded(graph)
    return branches(
        graph, USUAL,
        lambda backend: ksampler(graph, graph.selector(model, backend), **settings, **EMBEDDED),
        lambda latent: graph.add("TinyShapesImage", samples=latent, scale=16),
    )  # fmt: skip


def schedule() -> Graph:
    graph = Graph(
        "**A fast kernel, but exact first and last steps.** The steps that decide the composition, and those that "
        "draw the details, run with PyTorch's own kernel; the ones between with a kernel that is not exact. "
        "`emulated_int8` stands for one such as `sage_attn` and runs anywhere; choose yours instead. The model comes "
        "with the pack."
    )
    model, settings = embedded(graph)
    graph.lane = "attention and sampling"
    model = graph.selector(model, "emulated_int8")
    window = {"when": "precise first and last N", "window": "2", "blocks": "", "role": ""}
    model = graph.add("AttentionSchedule", model=model, backend="torch_sdpa", **window)
    return reported(graph, ksampler(graph, model, **settings, **EMBEDDED))


def text_and_record() -> Graph:
    graph = Graph(
        "**A configuration as text, and a record of what ran in the saved picture.** The text may also be the command "
        "line of vLLM-Omni or SGLang. Paste the record, or the picture's, in place of the text: with the same seed the "
        "same kernels make the same picture again. Runs anywhere: the model comes with the pack."
    )
    model, settings = embedded(graph)
    graph.lane = "attention and sampling"
    text = "default: torch_sdpa\nper_role:\n  cross: sdpa_math\n"
    model = graph.add("AttentionConfigText", model=model, text=text, file="none", component="transformer")
    sampled = ksampler(graph, model, **settings, **EMBEDDED)
    graph.lane = "result"
    record = graph.add("AttentionRecord", value=graph.add("TinyShapesImage", samples=sampled, scale=16))
    graph.add("SaveImage", images=record, filename_prefix="attention_record")
    graph.add("PreviewAny", "Record", source=output(record, 1))
    return graph


def benchmark() -> Graph:
    graph = Graph(
        "**How fast is each kernel on this machine?** Times the attention calls of HunyuanVideo 1.5 with and without "
        "its mask; a kernel that cannot run says why. No model is needed. 256 tokens are for a CPU: on a GPU set "
        "`tokens` to 0, the full lengths."
    )
    graph.lane = "benchmark"
    measured = graph.add(
        "AttentionBenchmark", presets="hv15", tokens=256, masked="both", backends="", dtype="bfloat16", seed=0
    )
    graph.lane = "result"
    graph.add("PreviewAny", "Table", source=measured)
    return graph


EMBEDDED_WORKFLOWS: dict[str, Callable[[], Graph]] = {
    "compare_sdpa_cudnn_sage": compare_by_hand,
    "compare_node": compare_node,
    "per_role": per_role,
    "schedule": schedule,
    "text_and_record": text_and_record,
    "benchmark": benchmark,
}
"""These run on any machine."""
