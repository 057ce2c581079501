"""Known trouble of inexact kernels by model family, with the calls that should run exactly instead.

A table, each row with the source of its claim. An advisory applies only if it is switched on; it beats a default, and
loses to roles and schedule entries (`Timetable.resolve`). Families are named as in `nodes/hook/roles.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..config import PLATFORM_ROUTE, RECOMMENDED, AttentionConfig, AttentionSpec
from ..config.layers import default_of, settings_of
from ..config.names import AUTO, AUTOTUNE
from ..config.schedule import ScheduleEntry
from ..config.timetable import Timetable
from ..engine.priorities import PRIORITIES
from ..kernels import BACKENDS
from ..values.mask_plan import NOTHING_HIDDEN
from ..values.reasons import Reason, known

if TYPE_CHECKING:
    from ..report import Row, RunReport

QUANTIZED = tuple(backend.id for backend in BACKENDS.values() if backend.accuracy == "quantized")
FP4 = tuple(name for name in QUANTIZED if BACKENDS[name].arithmetic == "fp4")
UNROTATED_INT8 = tuple(name for name in QUANTIZED if name not in FP4 and not BACKENDS[name].rotates)
"""Kernels that round query and key to INT8 without rotating their channels first (`Backend.rotates`)."""


@dataclass(frozen=True)
class Advisory:
    """One row: where in the models of a family an exact kernel is the better choice, with the source of the claim."""

    families: tuple[str, ...]
    title: str
    """Display name of the families."""
    what: str
    """What runs exactly, as text."""
    where: ScheduleEntry
    """The same as a schedule entry with backend `auto`, exact only."""
    kernels: str
    """The kernels that it warns of, as text."""
    backends: tuple[str, ...]
    """Their ids; with any other backend the advisory does not apply."""
    reason: str
    evidence: str
    """`measured` by this project, `reported` by others, or `assumed`; as in `engine/priorities.py`."""
    source: str

    @property
    def source_of_choice(self) -> str:
        """The source of its decisions in a run report."""
        return f"{RECOMMENDED}{self.title}: {self.what}"

    def applies_to(self, asked: str | None, accuracy: str) -> bool:
        """Whether it applies with the default backend `asked` (None: the platform's priorities) and this accuracy."""
        if asked in BACKENDS:
            return asked in self.backends
        if accuracy == "exact":
            return False
        return asked is not None or any(set(self.backends) & set(priority.lossy) for priority in PRIORITIES)

    def as_dict(self) -> dict[str, Any]:
        names = ("title", "what", "kernels", "reason", "evidence", "source")
        lists = {"families": list(self.families), "backends": list(self.backends)}
        return {**lists, **{name: getattr(self, name) for name in names}, "where": self.where.windows()}


def _where(**windows: Any) -> ScheduleEntry:
    return ScheduleEntry(AttentionSpec(AUTO), **windows)


ADVISORIES: tuple[Advisory, ...] = (
    Advisory(
        ("qwen_image",),
        "Qwen-Image",
        "calls with masked text exact",
        _where(masked=True),
        "quantised kernels",
        QUANTIZED,
        "black pictures with SageAttention, most builds of which take no mask or drop it; whether that is the cause is "
        "not settled",
        "reported",
        "ComfyUI#9184, ComfyUI#9629, QwenLM/Qwen-Image#32; of masks huggingface/diffusers#12605, "
        "thu-ml/SageAttention#99",
    ),
    Advisory(
        ("lumina2",),
        "Z-Image and Lumina 2",
        "calls with masked text exact",
        _where(masked=True),
        "quantised kernels",
        QUANTIZED,
        "broken and black pictures of Z-Image with SageAttention; ComfyUI 0.18 to 0.33 gives these models no mask, so "
        "there it changes nothing, and an exact backend for role joint helps",
        "reported",
        "ComfyUI#12138, Haoming02/sd-webui-forge-classic#637, PozzettiAndrea/ComfyUI-TRELLIS2#111; assumed of Lumina "
        "2, which is the same code",
    ),
    Advisory(
        ("ltx2", "ltxv"),
        "LTX",
        "cross-attention exact",
        _where(role="cross"),
        "quantised kernels",
        QUANTIZED,
        "the prompt comes in there, its masks go wrong in SageAttention without an error, and it is a small part of "
        "the work",
        "reported",
        "ComfyUI#13735 (masks on LTX), ComfyUI#10079 (prompts), vllm-project/vllm-omni#5283 (its share, of Wan 2.2)",
    ),
    Advisory(
        ("minimax_h3",),
        "MiniMax H3",
        "the last 3 blocks exact",
        _where(blocks="blocks.last 3"),
        "INT8 kernels but `comfy_kitchen_int8`, which rotates channels before it rounds",
        UNROTATED_INT8,
        "morphing near the end of a clip and garbled text: in the last blocks few channels of the keys are strong, and "
        "SageAttention's error is 5 % in block 49 of 50 against 2 % in block 44",
        "reported",
        "Comfy-Org/docs#1698; errors, on an RTX 4090, and the practice of blocks 47 to 49: "
        "fblissjr/ComfyUI-h3-explorations",
    ),
    Advisory(
        ("wan",),
        "Wan",
        "the first and the last step exact",
        _where(steps="first 1,last 1"),
        "FP4 kernels",
        FP4,
        "FP4 shows in its videos; the authors of SageAttention 3 advise a more precise kernel in the first and the "
        "last step of models such as this",
        "reported",
        "README of SageAttention 3, ComfyUI#10076, ComfyUI#11571, thu-ml/SageAttention#369; "
        "kijai/ComfyUI-WanVideoWrapper does so",
    ),
)


def for_family(family: str) -> tuple[Advisory, ...]:
    """The rows of a family; empty where nothing is known."""
    return tuple(advisory for advisory in ADVISORIES if family in advisory.families)


def lines_for(family: str, asked: str | None, accuracy: str) -> list[str]:
    """Text of a family's advisories, and whether each applies to this default."""
    if not for_family(family):
        known = ", ".join(name for advisory in ADVISORIES for name in advisory.families)
        return [f"nothing is recommended for family {family!r}; there is something for: {known}"]
    lines = []
    for advisory in for_family(family):
        default = f"{asked or AUTO} with accuracy {accuracy}"
        matters = f"applies to {default}" if advisory.applies_to(asked, accuracy) else f"changes nothing for {default}"
        lines.append(
            f"recommended for {advisory.title}: {advisory.what}, instead of {advisory.kernels} ({advisory.reason}; "
            f"{advisory.evidence}: {advisory.source}); {matters}"
        )
    return lines


def unused_advisories(family: str, run_report: RunReport) -> list[str]:
    """Notes after a run: each advisory that was off and would have changed a call."""
    layers = run_report.layers
    if not layers or any(layer.recommended for layer in layers):
        return []
    rows = [row for row in run_report.rows.values() if row.calls]
    blocks = tuple(dict.fromkeys(row.block for row in rows))
    defaults = {PLATFORM_ROUTE, *(f"{layer.source}.default" for layer in layers)}
    notes: list[str] = []
    for advisory in for_family(family):
        trial = Timetable((replace(layers[0], recommended=(advisory,)), *layers[1:]), blocks=blocks)
        if any(
            row.backend in advisory.backends
            and row.source.partition(f": {AUTOTUNE} (")[0] in defaults
            and trial.advisory(  # of any window
                trial.all, row.role, run_report.categories.get(row.role, row.role), row.block, _is_masked(row)
            )
            for row in rows
        ):
            what, why = known(advisory.what, "offer."), known(advisory.reason, "offer.why.")
            notes.append(Reason("offer", title=advisory.title, what=what, reason=why))
    return notes


NOT_USED = "not used: switch it on in Attention Backend Selector"
"""The end of the note about an advisory that was off."""


def _is_masked(row: Row) -> bool:
    return row.mask != "none" and NOTHING_HIDDEN not in row.mask


def note_without_advisory(family: str, layers: tuple[AttentionConfig, ...]) -> str:
    """The note where advisories are on and the family has none; empty if kernels are exact anyway."""
    asked, accuracy = default_of(layers), settings_of(layers).accuracy
    if (BACKENDS[asked].accuracy if asked is not None and asked in BACKENDS else accuracy) == "exact":
        return ""
    if any(advisory.applies_to(asked, accuracy) for advisory in for_family(family)):
        return ""
    return Reason("no_exceptions", family=family or Reason("no_exceptions.family"), backend=asked or AUTO)
