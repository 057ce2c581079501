"""Node Per-Role Attention Config: another backend for one role of a model."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...backends.config import LONGEST_ROLE
from ...backends.config.names import AUTO
from ...backends.values.bounded import nearest
from ...backends.values.errors import ConfigError
from ..hook import patch
from ..hook.roles import known_roles
from ..inputs import about_options, text_of, wrong_link
from .selector import CATEGORY, backend_menu, check_backend, environment, extra_input, spec_of


class PerRoleAttentionConfig(io.ComfyNode):
    """MODEL in, patched MODEL out; stacks with the selector and with itself, in any order."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PerRoleAttentionConfig",
            display_name="Per-Role Attention Config",
            category=CATEGORY,
            description=(
                "Chooses the kernel for one kind of attention in this model, e.g. self or cross. Stack several. "
                "A role that the model does not have changes nothing, and the run report says so. Other roles use "
                "auto. To keep ComfyUI's default for them, add a Selector set to comfy first."
            ),
            search_aliases=["attention role", "cross attention backend", "self attention backend"],
            inputs=[
                io.Model.Input("model"),
                io.String.Input(
                    "role",
                    default="self",
                    tooltip=(
                        "self: within the picture or video (joint text and picture attention too). cross: picture to "
                        "text. joint: text and picture together. Or a model's own role: wan.image_cross, flux.single, "
                        "ltx2.audio_to_video. The run report lists the roles of the model."
                    ),
                ),
                io.Combo.Input(
                    "backend",
                    options=backend_menu(),
                    default=AUTO,
                    tooltip="The backend for this role. auto: as if this node were not there.",
                ),
                extra_input(),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def validate_inputs(
        cls, backend: Any = None, role: Any = None, extra: Any = None, input_types: Any = None
    ) -> bool | str:
        """Everything that can be known before the graph runs; an input that is connected is None here."""
        problem = wrong_link(cls, input_types)
        checked = problem or check_backend(backend, input_types, extra)
        if checked is not True:
            return checked
        try:
            if isinstance(role, str):
                known_role(role_name(role))
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> Any:
        return environment()

    @classmethod
    def execute(cls, model: Any, role: str, backend: str, extra: str = "") -> io.NodeOutput:
        if not isinstance(role, str):
            raise ConfigError(f"role must be text, not {type(role).__name__}: {role!r}")
        name = role_name(role)
        spec = spec_of(backend, extra)
        said = patch.line_of_alias(backend) + about_options(extra)
        return io.NodeOutput(patch.set_role(model, name, spec, said))


def role_name(role: str) -> str:
    """A role as it was written, without the space around it.

    Raises:
        ConfigError: it is empty, or longer than any role's name.
    """
    name: str = text_of(role).strip()
    if not name:
        raise ConfigError("role is empty; write self, cross, joint, or a role of the model such as flux.single")
    if len(name) > LONGEST_ROLE:
        raise ConfigError(f"role {name!r}: {len(name)} characters > {LONGEST_ROLE}")
    return name


def known_role(name: str) -> None:
    """For what a person wrote into a widget. What a connection brings runs, and the report says what it matched.

    Raises:
        ConfigError: no model family has the role.
    """
    roles = known_roles()
    if name not in roles:
        near = nearest(name, roles)
        hint = f" did you mean {near[0]}?" if near else ""
        raise ConfigError(f"no model has the role {name!r};{hint} the roles are: {', '.join(roles)}")
