"""`Reason`: why a machine or a request is refused, as an id with values and as English text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

TEMPLATES: dict[str, str] = {
    "accuracy.forbidden": "accuracy {accuracy}, and the model forbids low precision for this call",
    "accuracy.not_allowed": "accuracy {accuracy} is not allowed",
    "all": "{reasons}",
    "architecture": "does not support {gfx}, only {taken}",
    "architecture.unknown": "an unknown AMD GPU",
    "asking": "the check failed: {error}",
    "autotune.no_times": "autotune: no times are kept for such calls, and none are taken here, so auto decides",
    "another.computed": "{pack} computed attention of role {role} by itself",
    "another.it": "{pack} computed it",
    "another.ordered": "{text}; {order}",
    "another.part": "{packs} computed {others} of {total} attention calls",
    "another.took_over": "{packs} took over attention",
    "autotune.tuned": "autotune: call shapes tuned: {count}; used from the next run on",
    "batch": "batch {batch} > {max}",
    "bypass.adapter": "Anima's text adapter",
    "bypass.and": "{first}, {rest}",
    "bypass.audio_injector": "the audio injector of Wan S2V",
    "bypass.causal": "the causal part of attention, which is the prompt's, and the vision model",
    "bypass.connectors": "the text connectors, which run before sampling",
    "bypass.context": "the context processor",
    "bypass.controlnets": "ControlNets, which run as models of their own",
    "bypass.every": "every attention call of this model",
    "bypass.faces": "the face blocks of Wan Animate",
    "bypass.gligen": "the layers of GLIGEN",
    "bypass.linear": "self-attention, which is linear in this model, and the lyric encoder",
    "bypass.multitalk": "the audio layers of MultiTalk",
    "bypass.music": "the music blocks and injector of WanDancer",
    "bypass.pooling": "the pooling of the text",
    "bypass.refiner": "the token refiner, which runs before sampling",
    "bypass.with": "{first}; {rest}",
    "called.never": "role '{role}' matched no attention call of this model; its roles are: {roles}",
    "called.never.joint": "{reason}; joint_is_self: true makes self cover joint attention",
    "cards.alone": "no other GPU is named",
    "cards.captured": "a CUDA graph is captured",
    "cards.compiled": "the model runs under torch.compile",
    "cards.core": "ComfyUI's MultiGPU CFG Split uses the GPUs already",
    "cards.device": "the model runs on {device}; heads are divided over CUDA devices only",
    "cards.failed": "the other GPUs cannot be used: {error}",
    "cards.gradients": "gradients are needed",
    "cards.group": "this process belongs to a torch.distributed group",
    "cards.home": "{backend}, {heads} heads, {q_len} x {kv_len} tokens: on one GPU ({reason})",
    "cards.hosted": "ComfyUI's own attention runs",
    "cards.left_out": "{card} is left out for the rest of the run: {reason}",
    "cards.lse": "the log-sum-exp is requested",
    "cards.none_left": "no other GPU is left",
    "cards.off": "attention over several GPUs is off: {reason}",
    "cards.one_head": "a single key head cannot be divided",
    "cards.part": "a part of the heads failed: {error}",
    "cards.part_refused": "the backend refuses a part of the heads: {error}",
    "cards.ran": "{card}: {backend} {calls} calls",
    "cards.refused": "another GPU cannot run it: {error}",
    "cards.slower": "divided {divided} ms, undivided {whole} ms",
    "cards.sparse": "sparse backends learn from all heads",
    "cards.unknown": "{card} is not a GPU of this machine",
    "cards.varlen": "its parts run as one varlen call",
    "causal": "does not support is_causal",
    "causal.lengths": "is_causal with q_len {q_len} != kv_len {kv_len}",
    "causal.mask": "is_causal together with a mask",
    "capability.in": "needs {article} {names} GPU {taken}; this one is {found}",
    "capability.min": "needs {article} {names} GPU or newer ({min}); this one is {found}",
    "capability.unknown": "the compute capability of this GPU is unknown",
    "comfy.ran": "ComfyUI's own attention ran: {reason}",
    "device": "needs {needed} (this is {found})",
    "device.cpu": "a CPU",
    "device.cuda": "an NVIDIA GPU",
    "device.list": "{one}, {other}",
    "device.mps": "an Apple GPU",
    "device.npu": "an Ascend NPU",
    "device.or": "{one} or {other}",
    "device.rocm": "an AMD GPU",
    "device.xla": "a TPU",
    "device.xpu": "an Intel GPU",
    "dtype": "does not support {dtype}",
    "failed": "{backend}: failed: {error}",
    "failed.later": "{earlier}; {reason}",
    "failed_before": "failed before on this call: {error}",
    "grouped": "does not support grouped query heads ({num_heads}/{num_kv_heads})",
    "guard.alarm": "guard: {reason}",
    "guard.alarm.call": "{reason} in call {number} of the block",
    "guard.changed": "the kernel changed query, key or value",
    "guard.l2.call": "relative L2 {found} of the whole call > {most}",
    "guard.l2.head": "relative L2 {found} of a head > {most}",
    "guard.not_finite": "output is not finite",
    "guard.output": "guard: the output of model call {number} was not finite",
    "guard.output.again": "{text}; it was computed again with exact kernels, which run from there on",
    "guard.output.first": "{text}, the first of this run",
    "guard.output.other": "{text}, nor with exact kernels: attention is not the cause",
    "guard.row": "error {found} of a row > {most}",
    "guard.unmasked": "the output is nearer to the result without the mask",
    "head_dim.in": "head_dim {head_dim} not in {taken}",
    "head_dim.max": "head_dim {head_dim} > {max}",
    "head_dim.min": "head_dim {head_dim} < {min}",
    "head_dim.multiple": "head_dim {head_dim} is not a multiple of {of}",
    "head_dim.multiple.dtype": "head_dim {head_dim} is not a multiple of {of} for {dtype}",
    "head_dim.values": "head_dim of values {values} != {keys}",
    "kv_len.max": "kv_len {kv_len} > {max}",
    "kv_len.min": "kv_len {kv_len} < {min}",
    "loading": "could not be loaded: {error}",
    "loading.lse": "its log-sum-exp could not be loaded: {error}",
    "lse.none": "gives no log-sum-exp",
    "mask": "does not support a {mask} mask",
    "named": "{name}: {reason}",
    "no_exceptions": "exceptions for this model: none are known for {family} with {backend}",
    "no_exceptions.family": "this family",
    "not_a_backend": "not a backend of this version",
    "num_heads": "num_heads {num_heads} > {max}",
    "offer": "recommended for {title}: {what} ({reason}); not used: switch it on in Attention Backend Selector",
    "offer.cross": "cross-attention exact",
    "offer.ends": "the first and the last step exact",
    "offer.last_blocks": "the last 3 blocks exact",
    "offer.masked": "calls with masked text exact",
    "offer.why.ltx": (
        "the prompt comes in there, its masks go wrong in SageAttention without an error, and it is a small "
        "part of the work"
    ),
    "offer.why.minimax_h3": (
        "morphing near the end of a clip and garbled text: in the last blocks few channels of the keys are "
        "strong, and SageAttention's error is 5 % in block 49 of 50 against 2 % in block 44"
    ),
    "offer.why.qwen_image": (
        "black pictures with SageAttention, most builds of which take no mask or drop it; whether that is the "
        "cause is not settled"
    ),
    "offer.why.wan": (
        "FP4 shows in its videos; the authors of SageAttention 3 advise a more precise kernel in the first "
        "and the last step of models such as this"
    ),
    "offer.why.z_image": (
        "broken and black pictures of Z-Image with SageAttention; ComfyUI 0.18 to 0.33 gives these models no "
        "mask, so there it changes nothing, and an exact backend for role joint helps"
    ),
    "only_comfyui": "runs only inside ComfyUI, which hands over its own function with each call",
    "options.left_out": "kernel options {value} are no options of a backend and were left out",
    "package.missing": "package {package} is not installed",
    "package.needed": "{reason}, which {by} needs",
    "package.unreadable": "package {package} has no readable version: {found}",
    "package.version": "package {package} {found} does not meet {specifier}",
    "parallel.ran": "parallel: {strategy} over {ranks} ranks",
    "parallel.replaced": "attention backend {backend} failed in the group ({reason}); {other} runs on all ranks",
    "parallel.unlisted": "not among the priorities there",
    "preference.gave_way": "{preference} gave way to {source}",
    "preference.left_out": "{preference} was left out: {reason}",
    "probe": "a probe in this environment {outcome}; after a repair run doctor --probe {backend} "
    "or doctor --forget {backend}, and start anew",
    "role.guessed": "role guessed as {role} for {path}: the role table does not know it",
    "scale": "scale {scale} is not head_dim ** -0.5",
    "runs_on": "the run goes on",
    "runs.joined": "the last of {count} runs of one comparison: {names}",
    "sparse.now": "{backends} skips work from this version on; before, calls for it fell back to another backend",
    "times": "{text} ({count} times)",
    "torch.cpu_only": "This is a CPU-only build of PyTorch. To use a GPU, install the CUDA or ROCm build from "
    "ComfyUI's install guide.",
    "torch.no_gpu": "This PyTorch is built for {built_for} but finds no GPU.",
    "unavailable": "{why}",
    "unfinished": "the run did not finish: {cause}",
    "unreached": "no attention call of this model reached this node; {packs} runs the model in its own way",
    "whole.few": "fewer than {count} tokens",
    "whole.first.layers": "the first {count} layers",
    "whole.first.of": "the first {count} of {steps} steps",
    "whole.first.scaled": "the first {count} of {steps} steps ({published} of {all} in the publication)",
    "whole.first.steps": "the first {count} steps",
    "whole.heads": "{heads} heads, and the mask strategy file has {count}",
    "whole.kept.blocks": "all {count} blocks are kept",
    "whole.kept.chunks": "all {count} chunks are kept",
    "whole.kept.clusters": "all {count} clusters are kept",
    "whole.kept.cubes": "all {count} cubes are kept",
    "whole.kept.tiles": "all {count} tiles are kept",
    "whole.layer.dense": "layer {layer} is one of dense_layers",
    "whole.layer.missing": "layer {layer} is not among the {count} of the mask strategy file",
    "whole.layer.unknown": "the layer's number, which a mask strategy file needs, is unknown",
    "whole.windows.blocks": "the windows hold all {count} blocks",
    "whole.windows.tiles": "the windows hold all {count} tiles",
}
"""Id -> text with values in braces. Kernels add theirs with `template`."""


def template(reason_id: str, text: str) -> str:
    """Register the text of an id; returns the id.

    Raises:
        ValueError: the id has another text.
    """
    if TEMPLATES.setdefault(reason_id, text) != text:
        raise ValueError(f"the reason {reason_id} is {TEMPLATES[reason_id]!r}, not {text!r}")
    return reason_id


class Reason(str):
    """An English text with its id and values, for tests and translations.

    A value may be another reason, or a tuple of reasons. `needs`: a requirement that would help, for the support table.
    """

    id: str
    values: Mapping[str, object]

    def __new__(cls, reason_id: str, /, **values: object) -> Reason:
        """Tuples of texts are joined by commas, tuples of reasons by semicolons.

        Raises:
            KeyError: the id has no text.
        """
        words = TEMPLATES[reason_id]
        return _made(words.format(**{name: _shown(value) for name, value in values.items()}), reason_id, values)

    def __reduce__(self) -> tuple[object, ...]:
        return _made, (str(self), self.id, dict(self.values))

    def plain(self) -> dict[str, object]:
        """{"id", "text", "values"} for JSON; a reason among the values in the same form."""

        def of(value: object) -> object:
            if isinstance(value, tuple | list):
                return [of(each) for each in value]
            return value.plain() if isinstance(value, Reason) else str(value)

        return {"id": self.id, "text": str(self), "values": {name: of(value) for name, value in self.values.items()}}

    def causes(self) -> Iterator[Reason]:
        """The innermost reasons among its values; itself without any."""
        values = [each for value in self.values.values() for each in (value if isinstance(value, tuple) else (value,))]
        inner = [value for value in values if isinstance(value, Reason)]
        for reason in inner:
            yield from reason.causes()
        if not inner:
            yield self


def as_reason(text: str) -> Reason:
    """The reason itself, or a plain text as one, which has no translation."""
    return text if isinstance(text, Reason) else Reason("unavailable", why=text)


def known(text: str, prefix: str) -> str:
    """The reason without values that has this English text, of the ids that begin so; else the text itself."""
    found = next((name for name, words in TEMPLATES.items() if name.startswith(prefix) and words == text), None)
    return text if found is None else Reason(found)


def with_values(text: str, prefix: str) -> str:
    """The reason that has this English text, with its values, of the ids that begin so; else the text itself.

    For texts that are made often and read seldom. A value is one word.
    """
    for name, words in TEMPLATES.items():
        if name.startswith(prefix):
            pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^\\s,]+)", re.escape(words))
            if found := re.fullmatch(pattern, text):
                return Reason(name, **found.groupdict())
    return text


def error_text(error: BaseException) -> str:
    """The text of an error; its class only where the text alone says nothing, as in `KeyError: 'sm90'`."""
    text = str(error)
    return text if " " in text.strip() else f"{type(error).__name__}: {text}"


def _made(text: str, reason_id: str, values: Mapping[str, object]) -> Reason:
    made = str.__new__(Reason, text)
    made.id, made.values = reason_id, values
    return made


def phrases(data: object) -> dict[str, object]:
    """Every reason in plain data, as text -> `plain` of it: what a page needs to say it in another language."""
    found: dict[str, object] = {}
    pending = [data]
    while pending:
        one = pending.pop()
        if isinstance(one, Reason):
            found[str(one)] = one.plain()
        elif isinstance(one, Mapping):
            pending += [*one, *one.values()]
        elif isinstance(one, list | tuple):
            pending += one
    return found


def reason_id(reason: str) -> str:
    """The id of a reason; empty for plain text."""
    return reason.id if isinstance(reason, Reason) else ""


def _shown(value: object) -> object:
    if isinstance(value, tuple) and value and all(isinstance(each, Reason) for each in value):
        return "; ".join(value)
    if isinstance(value, tuple) and all(isinstance(each, str) for each in value):
        return f"({', '.join(value)})"
    return value
