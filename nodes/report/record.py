"""Node Attention Record: the decisions of the samplers before it, put into the metadata of what is saved after it."""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from typing import Any

import comfyui_version
from comfy_api.latest import io

from ...backends.observe.replay.record import as_record
from ...backends.values.privacy import clean
from ..configure.selector import CATEGORY
from ..history import graph, runs
from ..inputs import wrong_link
from .report import find_stages

log = logging.getLogger("attention_backends")

KEY = "attention_backends"
"""The entry of the metadata: the name of a text chunk in a PNG."""
NOT_WRITTEN = "the attention record cannot be put into pictures of this prompt: it was queued without extra_pnginfo"
REMEDY = 'a script sends {"prompt": ..., "extra_data": {"extra_pnginfo": {}}}; output record has the record anyway'


class AttentionRecord(io.ComfyNode):
    """Anything in, the same out; on the way the record goes into the metadata that ComfyUI's save nodes write."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        template = io.MatchType.Template("value")
        return io.Schema(
            node_id="AttentionRecord",
            display_name="Attention Record",
            category=CATEGORY,
            description=(
                "Place it just before Save Image or Save Video: which kernel computed "
                "attention goes into the file's metadata. Paste the record into Attention Config From Text, and the "
                "same seed gives the same picture later."
            ),
            search_aliases=["attention metadata", "reproducible attention"],
            inputs=[
                io.MatchType.Input(
                    "value", template=template, tooltip="Images, a latent, or whatever else comes after the sampler."
                )
            ],
            outputs=[
                io.MatchType.Output(template=template, display_name="value"),
                io.String.Output(display_name="record", tooltip="JSON, for Attention Config From Text and for replay."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            not_idempotent=True,
        )

    @classmethod
    def validate_inputs(cls, input_types: Any = None) -> bool | str:
        return wrong_link(cls, input_types) or True

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        """What is saved after this node, and from what: where any of that changed, something is saved anew.

        The metadata belong to one prompt, so this node has to run again whenever a node after it does; and where none
        of them does, it must not run, or a prompt that is queued twice would save everything twice.
        """
        prompt_id, node_id = runs.executing()
        prompt = runs.queued(prompt_id)
        mine = graph.origin(prompt, node_id) if node_id is not None else None
        if mine is None:
            return secrets.token_hex(16)
        later = [graph.signature(prompt, name) for name in (mine, *graph.descendants(prompt, mine))]
        return hashlib.sha256(" ".join(later).encode()).hexdigest()

    @classmethod
    def execute(cls, value: Any) -> io.NodeOutput:
        prompt, node_id = cls.hidden.prompt or {}, str(cls.hidden.unique_id)
        stages, missing = find_stages(prompt, node_id, runs.executing()[0])
        known = (runs.decisions(stage["number"]) for stage in stages)
        found = clean([one for one in known if one is not None]), clean(missing)
        made_by = {"comfyui": comfyui_version.__version__}
        metadata = cls.hidden.extra_pnginfo
        if isinstance(metadata, dict):
            metadata[KEY] = as_record(found[0], made_by, found[1], before=metadata.get(KEY))
        else:
            log.warning("%s; %s", NOT_WRITTEN, REMEDY)
        return io.NodeOutput(value, json.dumps(as_record(found[0], made_by, found[1])))
