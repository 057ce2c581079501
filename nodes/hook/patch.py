"""Putting a configuration on a ComfyUI MODEL: on a clone, stacking with our earlier nodes, composing with others."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from comfy.patcher_extension import WrappersMP

from ...backends.config import AttentionConfig, AttentionSpec
from ...backends.config.card_names import card_names
from ...backends.config.layers import record_of
from ...backends.config.names import AUTOTUNE, CHOICES
from ...backends.config.schedule import ScheduleEntry
from ...backends.config.systems import key_of, line_of
from ...backends.config.text import from_environment
from ...backends.engine.priorities import default_line
from ...backends.observe.advisories import for_family, note_without_advisory
from . import attention_modules
from .memory import prepare_sampling_wrapper
from .origins import PURE_SELECTORS, name_of, title_of
from .other_packs import KEY, OVERRIDE
from .override import Override
from .run import router_for
from .wrappers import apply_model_wrapper, calc_cond_batch_wrapper, outer_sample_wrapper

log = logging.getLogger("attention_backends")

NODE_SOURCE = "node"


def current_config(model: Any) -> AttentionConfig:
    """The configuration that our earlier nodes put on this model, or an empty one."""
    override = _options(model).get(KEY)
    if isinstance(override, Override):
        return override.layers[0]
    return AttentionConfig(source=NODE_SOURCE)  # what it does not say comes from the environment


def set_default(
    model: Any,
    backend: str,
    *,
    accuracy: str,
    strict: bool,
    guard: str,
    recommended: bool | None = None,
    extra: Mapping[str, object] | None = None,
    said: tuple[str, ...] = (),
) -> Any:
    """A clone of `model` whose default backend and settings are these; its per-role entries stay.

    `recommended` switches the advisories for this model's family on or off; None keeps the earlier setting.
    `extra`: options of the backend. `said`: notes about what the person wrote.
    """
    before, default = current_config(model), AttentionSpec(backend, extra or {})
    config = replace(before, default=default, accuracy=accuracy, strict=strict, guard=guard)
    notes = line_of_alias(backend) + said + _replaced("the default", before.default, default)
    if recommended is not None:
        family = attention_modules.family_of_model(model.model.diffusion_model)
        name = family.name if family is not None else ""
        config = replace(config, recommended=for_family(name) if recommended else ())
        if recommended and (note := note_without_advisory(name, (config, *from_environment(above=(config,))))):
            notes += (note,)
    return _patched(model, config, notes)


def set_role(model: Any, role: str, spec: AttentionSpec, said: tuple[str, ...] = ()) -> Any:
    """A clone of `model` with one more per-role entry; the last writer of a role wins, with a note in the run report.

    `said`: notes about the name that the person wrote.
    """
    config = current_config(model)
    if spec.is_auto:  # as if this node were not there
        return _patched(model, config, ())
    notes = said + _replaced(f"role {role}", config.per_role.get(role), spec)
    covers = config.joint_is_self or role == "self"  # a node's own entry for self covers joint attention
    per_role = {**config.per_role, role: spec}
    return _patched(model, replace(config, per_role=per_role, joint_is_self=covers), notes)


def line_of_alias(name: str) -> tuple[str, ...]:
    """The note about another system's name for a backend; none for a name of our menu."""
    line = line_of(name) if key_of(name) not in CHOICES else ""
    return (line,) if line else ()


def add_to_schedule(model: Any, entry: ScheduleEntry, said: tuple[str, ...] = ()) -> Any:
    """A clone of `model` with one more entry in its schedule; where windows overlap, the last writer wins."""
    config = current_config(model)
    covers = config.joint_is_self or entry.role == "self"
    return _patched(model, replace(config, schedule=(*config.schedule, entry), joint_is_self=covers), said)


def set_cards(model: Any, devices: str) -> Any:
    """A clone of `model` whose heads are divided over these devices, as `card_names` reads them.

    Raises:
        ConfigError: the text is not understood.
    """
    return _patched(model, replace(current_config(model), cards=card_names(devices, "devices")), ())


def set_config(model: Any, config: AttentionConfig) -> Any:
    """A clone of `model` with everything that `config` says; what it does not say stays as earlier nodes had it."""
    before = current_config(model)
    notes = config.notes
    if config.record is not None:  # a record decides every role of the whole run
        notes += _gone(before)
        before = replace(before, per_role={}, schedule=(), record=config.record)
    if not config.default.is_auto:
        notes += _replaced("the default", before.default, config.default)
    for role, spec in config.per_role.items():
        notes += _replaced(f"role {role}", before.per_role.get(role), spec)
    settings = {name: getattr(config, name) for name in ("accuracy", "strict", "guard", "cards")}
    merged = replace(
        before,
        default=before.default if config.default.is_auto else config.default,
        per_role={**before.per_role, **config.per_role},
        schedule=(*before.schedule, *config.schedule),
        joint_is_self=(config if config.names_self else before).joint_is_self,
        **{name: value for name, value in settings.items() if value is not None},
    )
    return _patched(model, merged, notes)


def _gone(earlier: AttentionConfig) -> tuple[str, ...]:
    """The note about settings of earlier nodes that a record replaces."""
    replaced = [f"role {role} ({spec.backend})" for role, spec in earlier.per_role.items()]
    replaced += [f"the schedule's {entry.describe()} ({entry.spec.backend})" for entry in earlier.schedule]
    replaced += ["an earlier record"] if earlier.record is not None else []
    return (f"the record replaces what earlier nodes said: {', '.join(replaced)}",) if replaced else ()


def _replaced(what: str, earlier: AttentionSpec | None, spec: AttentionSpec) -> tuple[str, ...]:
    """The note about a second writer of one entry; the last one wins."""
    if earlier is None or earlier.is_auto or earlier == spec:
        return ()
    return (f"{what} was set twice: {spec.backend} replaces {earlier.backend}",)


def _options(model: Any) -> dict[str, Any]:
    """The transformer options of a MODEL.

    Raises:
        ValueError: the input is not a diffusion model that can be patched.
    """
    inner = getattr(model, "model", None)
    if not hasattr(inner, "diffusion_model") or not hasattr(model, "model_options"):
        raise ValueError(
            f"this MODEL has no diffusion model to patch (got {type(model).__name__}); connect the MODEL output of a"
            " model or checkpoint loader"
        )
    options: dict[str, Any] = model.model_options.setdefault("transformer_options", {})
    return options


def _patched(model: Any, config: AttentionConfig, notes: tuple[str, ...]) -> Any:
    before = _options(model).get(OVERRIDE)
    foreign = before
    if isinstance(before, Override):
        foreign, notes = before.foreign, before.notes + notes
    elif before is not None and PURE_SELECTORS.fullmatch(name_of(before)):
        foreign, notes = None, (*notes, f"an earlier node's choice ({title_of(before)}) was replaced by ours")
    override = Override((config, *from_environment(above=(config,))), foreign, notes)
    clone = model.clone()
    options = _options(clone)
    options[KEY] = options[OVERRIDE] = override
    wrappers = options.setdefault("wrappers", {})
    wrappers.setdefault(WrappersMP.OUTER_SAMPLE, {})[KEY] = [outer_sample_wrapper]
    wrappers.setdefault(WrappersMP.APPLY_MODEL, {})[KEY] = [apply_model_wrapper]
    wrappers.setdefault(WrappersMP.PREPARE_SAMPLING, {})[KEY] = [prepare_sampling_wrapper]
    wrappers.setdefault(WrappersMP.CALC_COND_BATCH, {})[KEY] = [calc_cond_batch_wrapper]
    _announce(clone, override)
    return clone


def _announce(model: Any, override: Override) -> None:
    """Log what the default resolves to, in the words that users of vLLM-Omni know."""
    router = router_for(model.load_device)
    if (record := record_of(override.layers)) is not None:
        log.info("Attention backends as in the record from %s", record.source)
        return
    asked = next((layer.default.backend for layer in override.layers if not layer.default.is_auto), None)
    if asked is None:
        log.info("%s", default_line(router.platform, router.default_backend()))
    elif asked != AUTOTUNE and (reasons := router.unavailable(asked)):
        log.warning("attention backend %s cannot run here: %s", asked, "; ".join(reasons))
    else:
        log.info("Using diffusion attention backend %r", asked.upper())
