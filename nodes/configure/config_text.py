"""Node Attention Config From Text: a configuration as people write it, for one model, from text or from a file."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ...backends.config import AttentionConfig
from ...backends.config.text import FILE_ENDINGS, parse_config
from ...backends.values import bounded
from ...backends.values.errors import ConfigError
from ..hook import patch
from ..inputs import text_of, wrong_link
from .selector import CATEGORY, environment

FOLDER = "attention_backends"
"""Below ComfyUI's `user/default`: the only folder whose files this node reads."""
NO_FILE = "none"
COMPONENTS = ("transformer", "transformer_2")
MAX_BYTES = bounded.MOST_JSON
MOST_CHECKED = 8192
"""Characters or bytes of a configuration that is read before the graph runs, where the server waits for it.

People write less. A longer one, such as a record, is read when the node runs, where it may take its time.
"""


def folder() -> Path:
    """Where configuration files lie. It need not exist."""
    return Path(folder_paths.get_user_directory()) / "default" / FOLDER


def files() -> dict[str, Path]:
    """The files that may be chosen, by name: those in the folder itself, no links that lead out of it."""
    directory = folder()
    if not directory.is_dir():
        return {}
    root = directory.resolve()
    found = {path.name: path for path in directory.iterdir() if path.name.lower().endswith(FILE_ENDINGS)}
    return {name: path for name, path in sorted(found.items()) if path.is_file() and path.resolve().parent == root}


def content(name: str) -> bytes:
    """What a file of the folder holds.

    Raises:
        ConfigError: there is no such file in the folder, or it is too large.
    """
    known = files()
    if name not in known:
        raise ConfigError(
            f"no configuration file {name!r}; there are: {', '.join(known) or 'none'}. Put .json, .yaml or .yml files "
            f"into the folder user/default/{FOLDER} of ComfyUI"
        )
    try:
        return bounded.read_file(known[name], MAX_BYTES)
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        raise ConfigError(f"{name}: {error.strerror}: no configuration is that long") from error


def read_file(name: str, component: str) -> AttentionConfig:
    """Read a file of the folder.

    Raises:
        ConfigError, UnknownBackendError: it cannot be read or understood.
    """
    try:
        text = content(name).decode("utf-8-sig")  # Windows editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not UTF-8 text; save it as UTF-8") from error
    return parse_config(text, name, component=component, read_files=False)


def configuration(text: Any, file: str | None, component: str) -> AttentionConfig:
    """The configuration from the node's inputs.

    Raises:
        ConfigError, UnknownBackendError: an input cannot be read or understood.
    """
    if not isinstance(text, str):
        raise ConfigError(f"text must be text, not {type(text).__name__}: {text!r}")
    text, file = text_of(text), NO_FILE if file is None else file
    if text.strip() and file != NO_FILE:
        raise ConfigError(f"both text and the file {file} are given; clear the text, or set file to {NO_FILE}")
    if file != NO_FILE:
        return read_file(file, component)
    return parse_config(text, "text", component=component, read_files=False)


def understood(text: str, file: str) -> None:
    """Read a configuration for each component, if it is short.

    Raises:
        ConfigError, UnknownBackendError: it cannot be understood for any of them.
    """
    if len(text) > MOST_CHECKED or (file != NO_FILE and len(content(file)) > MOST_CHECKED):
        return
    for component in COMPONENTS[1:]:
        try:
            configuration(text, file, component)
        except ValueError:
            continue
        return
    configuration(text, file, COMPONENTS[0])


class AttentionConfigText(io.ComfyNode):
    """MODEL in, patched MODEL out; stacks with the selector and the per-role node, in any order."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AttentionConfigText",
            display_name="Attention Config From Text",
            category=CATEGORY,
            description=(
                "Reads a whole configuration: JSON, YAML, name=value pairs, or the command line of vLLM-Omni, SGLang "
                "diffusion or Smart-Diffusion, pasted as it is. What it says wins over earlier attention nodes, later "
                "ones win over it, and the run report says so."
            ),
            search_aliases=["attention json", "attention yaml", "vllm attention", "sglang attention"],
            inputs=[
                io.Model.Input("model"),
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    tooltip=(
                        "For example: flash_attn, or per_role.cross.backend=torch_sdpa, or\n"
                        "default: sage_attn\nper_role:\n  cross: torch_sdpa\nstrict: true"
                    ),
                ),
                io.Combo.Input(
                    "file",
                    options=[NO_FILE, *files()],
                    default=NO_FILE,
                    optional=True,
                    tooltip=f"A .json, .yaml or .yml file from user/default/{FOLDER}, instead of text.",
                ),
                io.Combo.Input(
                    "component",
                    options=list(COMPONENTS),
                    default=COMPONENTS[0],
                    optional=True,
                    tooltip=(
                        "Which model of a pipeline this is, where a configuration of SGLang tells them apart: "
                        "transformer_2 is the second expert, such as Wan 2.2's low-noise model."
                    ),
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def validate_inputs(cls, file: Any = None, text: Any = None, input_types: Any = None) -> bool | str:
        """Read what will run, as files may have changed since the page was loaded; what is connected is None here.

        ComfyUI itself checks `component`, which then is not known here: a configuration is wrong that is so for each.
        """
        if problem := wrong_link(cls, input_types):
            return problem
        name = NO_FILE if file is None else str(file)
        try:
            if isinstance(text, str) and "file" not in (input_types or {}):
                understood(text, name)
            elif name != NO_FILE:
                content(name)
        except (ValueError, OSError) as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: Any = NO_FILE, **_: Any) -> Any:
        """What decides the result beside the inputs: the environment and what is in the file."""
        try:
            digest = "" if file in (None, NO_FILE) else hashlib.sha256(content(str(file))).hexdigest()
        except (ConfigError, OSError) as error:
            digest = str(error)
        return f"{environment()} {digest}"

    @classmethod
    def execute(cls, model: Any, text: str, file: str = NO_FILE, component: str = COMPONENTS[0]) -> io.NodeOutput:
        return io.NodeOutput(patch.set_config(model, configuration(text, file, component)))
