"""`apply`, `attention_backend`, `reset` and `report` for models and pipelines of Diffusers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch

from ...backends.config import AttentionConfig
from ...backends.config.layers import named_backends, settings_of
from ...backends.config.mapping import FIELDS
from ...backends.config.names import AUTO, AUTOTUNE
from ...backends.config.text import from_environment, parse_config
from ...backends.engine.routers import router_for
from ...backends.observe.replay.record import as_record, of_run
from ...backends.report import RunReport
from ...backends.values.bounded import nearest
from ...backends.values.errors import ConfigError, NoBackendError
from .chosen import Chosen, close_block, open_block
from .routing import Routing, attention_modules, routing_of, use
from .summary import text_of

DIFFUSION_MODELS = ("transformer", "transformer_2", "unet")
"""Components of a pipeline that a configuration without component names is for."""


class Applied:
    """A configuration in use on one or several models; what `apply` returns."""

    def __init__(self, chosen: dict[str, Chosen]) -> None:
        self._chosen = chosen

    @property
    def reports(self) -> dict[str, RunReport]:
        """The report of the latest run of each component."""
        return {name: chosen.report() for name, chosen in self._chosen.items()}

    def summary(self) -> str:
        """What ran in the latest run of each component: roles with backends and calls; below it the reasons."""
        return "\n".join(text_of(name, one.report(), one.unmatched()) for name, one in self._chosen.items())

    def __repr__(self) -> str:
        """Without reading a device."""
        return f"<configuration applied to {', '.join(self._chosen)}; summary() tells what ran>"

    def record(self) -> dict[str, Any]:
        """The decisions of the latest runs, for metadata of a picture and for replay as a configuration."""
        runs = [run for report in self.reports.values() if (run := of_run(report)) is not None]
        return as_record(runs, {"diffusers": version("diffusers")})

    def reset(self) -> None:
        """Restore the models."""
        for chosen in self._chosen.values():
            if chosen.routing.applied is chosen:
                _remove_applied(chosen.routing)


def apply(
    model: object, config: object, *, strict: bool | None = None, accuracy: str | None = None,
    guard: str | None = None, scheduler: object = None,
) -> Applied:  # fmt: skip
    """Route the attention calls of a model through the backends that `config` names, until `reset`.

    A configuration that was applied before is replaced. Other models, and Diffusers' own registry, are not changed.

    Args:
        model: a model of Diffusers, a pipeline, or a mapping from names to models.
        config: anything that `parse_config` reads. For a pipeline it is for its diffusion models (`transformer`,
            `transformer_2`, `unet`), unless it is a mapping whose keys are all names of the pipeline's components.
        strict, accuracy, guard: as in a configuration; None leaves it to `config`.
        scheduler: whose steps count for schedules; default: the pipeline's.

    Raises:
        UnknownBackendError, ConfigError: invalid, or a model has no attention module that can be routed; nothing was
            changed.
        NoBackendError: strict and a named backend cannot run here, or the model has context parallel attention;
            nothing was changed.
    """
    parsed = _parsed(model, config, "apply", strict=strict, accuracy=accuracy, guard=guard)
    scheduler_of = _scheduler_of(model, scheduler)
    made = {}
    for name, (component, layers) in parsed.items():
        routing = use(component)
        chosen = made[name] = Chosen(routing, layers, scheduler_of)
        before, routing.applied = routing.applied, chosen
        if before is not None:
            before.close()
            routing.release()
    return Applied(made)


def reset(model: object) -> None:
    """Restore a model, or all models of a pipeline or mapping; does nothing where nothing is applied."""
    for component in _models(model, "reset").values():
        routing = routing_of(component)
        if routing is not None and routing.applied is not None:
            _remove_applied(routing)


@contextmanager
def attention_backend(
    model: object, config: object, *, strict: bool | None = None, accuracy: str | None = None,
    guard: str | None = None, scheduler: object = None,
) -> Iterator[Applied]:  # fmt: skip
    """As `apply`, for forwards that this thread's context makes inside the block.

    Blocks nest, above what is applied: the inner one has precedence, what it does not set comes from the outer one.
    """
    parsed = _parsed(model, config, "attention_backend", strict=strict, accuracy=accuracy, guard=guard)
    scheduler_of = _scheduler_of(model, scheduler)
    with ExitStack() as stack:
        made = {}
        for name, (component, layers) in parsed.items():
            routing = use(component)
            stack.callback(routing.release)
            chosen = made[name] = Chosen(routing, layers, scheduler_of)
            open_block(chosen)
            stack.callback(close_block, chosen)
        yield Applied(made)


def report(model: object) -> dict[str, RunReport]:
    """The run report of the latest run of each model that a configuration is applied to."""
    found = {}
    for name, component in _models(model, "report").items():
        routing = routing_of(component)
        if routing is not None and routing.applied is not None:
            found[name] = routing.applied.report()
    return found


def _remove_applied(routing: Routing) -> None:
    chosen, routing.applied = routing.applied, None
    if chosen is not None:
        chosen.close()
        routing.release()


def _scheduler_of(model: object, scheduler: object) -> Callable[[], Any]:
    """How to find the scheduler whose steps count: the one given, else the pipeline's own, which can be replaced."""
    own = getattr(model, "scheduler", None)
    if scheduler is not None or own is None or isinstance(model, torch.nn.Module):
        given = scheduler if scheduler is not None else own
        return lambda: given
    pipeline: Callable[[], object | None]
    try:
        pipeline = weakref.ref(model)
    except TypeError:  # has __slots__, or is a stand-in for a pipeline
        pipeline = lambda: model  # noqa: E731
    return lambda: own if (alive := pipeline()) is None else getattr(alive, "scheduler", None)


def _components(model: object, where: str) -> Mapping[str, object]:
    """What a pipeline, or a mapping of models, has by name, missing ones too."""
    if isinstance(model, torch.nn.Module):
        return {"model": model}
    components = model if isinstance(model, Mapping) else getattr(model, "components", None)
    if not isinstance(components, Mapping):
        shown = repr(model) if isinstance(model, str) else type(model).__name__
        raise ConfigError(
            f"{where}: {shown} is neither a model, nor a pipeline, nor a mapping of models\n"
            "  what to do: give the loaded pipeline, or one of its models, such as pipe.transformer"
        )
    return components


def _models(model: object, where: str) -> dict[str, torch.nn.Module]:
    """Models by component name."""
    components = _components(model, where)
    return {name: one for name, one in components.items() if isinstance(one, torch.nn.Module)}


def _by_component(
    model: object, models: Mapping[str, torch.nn.Module], config: object, where: str
) -> dict[str, object] | None:
    """Each named component's configuration; None for a configuration that names none.

    Raises:
        ConfigError: a name is not that of a model which is there.
    """
    if not isinstance(config, Mapping) or set(config) & set(FIELDS):
        return None
    if isinstance(model, torch.nn.Module):
        alone = len(config) == 1 and set(config) <= set(DIFFUSION_MODELS)
        return {"model": next(iter(config.values()))} if alone else None
    components = {*_components(model, where), *DIFFUSION_MODELS}
    near = {name: nearest(str(name), components, cutoff=0.8) for name in config if name not in models}
    if not (set(config) & components or any(near.values())):
        return None
    for name, others in near.items():
        hint = f" did you mean {others[0]}?" if others and others[0] in models else ""
        shown = "the mapping" if isinstance(model, Mapping) else type(model).__name__
        raise ConfigError(f"{where}: {shown} has no model {name!r};{hint} its models: {', '.join(models) or 'none'}")
    return dict(config)


def _parsed(
    model: object, config: object, where: str, **given: Any
) -> dict[str, tuple[torch.nn.Module, tuple[AttentionConfig, ...]]]:
    """Each model with its layers: the configuration, then the environment; everything is checked before a change."""
    models = _models(model, where)
    settings = {name: value for name, value in given.items() if value is not None}
    by_component = _by_component(model, models, config, where)
    if by_component is not None:
        chosen = {name: (one, where if name == "model" else f"{where}[{name!r}]") for name, one in by_component.items()}
    else:
        names = [name for name in models if name in DIFFUSION_MODELS] or list(models)
        if not isinstance(model, torch.nn.Module | Mapping):
            names = [name for name in models if name in DIFFUSION_MODELS]
        chosen = {name: (config, where) for name in names}
    if not chosen:
        raise ConfigError(
            f"{where}: {type(model).__name__} has none of the components {', '.join(DIFFUSION_MODELS)}; "
            "name others in a mapping, such as {'vae': 'torch_sdpa'}"
        )
    parsed = {}
    for name, (value, source) in chosen.items():
        component = name if name != "model" else "transformer"
        read = parse_config(value, source, component=component)
        own = replace(read, **settings) if settings else read
        layers = (own, *from_environment(above=(own,)))
        _must_run(models[name], layers)
        _must_have_attention(models[name], name, source)
        parsed[name] = models[name], layers
    return parsed


def _must_have_attention(model: torch.nn.Module, name: str, source: str) -> None:
    """Raise where nothing of a model can be routed, as in text encoders of transformers before 5."""
    module = getattr(model, "_orig_mod", model)
    if next(attention_modules(module), None) is not None:
        return
    of_transformers = type(module).__module__.startswith("transformers.")
    remedy = f"choose its kernel by its set_attn_implementation, and leave {name} out here" if of_transformers \
        else "give a pipeline, or a model of Diffusers" if name == "model" else f"leave {name} out here"  # fmt: skip
    raise ConfigError(
        f"{source}: {name} ({type(module).__name__}) has no attention module that can be routed\n  what to do: {remedy}"
    )


def _must_run(model: torch.nn.Module, layers: tuple[AttentionConfig, ...]) -> None:
    """Raise where the model has context parallel attention, or a strict configuration names what cannot run here."""
    module = getattr(model, "_orig_mod", model)
    parallel = getattr(module, "_parallel_config", None)
    if parallel is not None and getattr(parallel, "context_parallel_config", None) is not None:
        from . import in_group

        how = in_group.read(parallel)
        unfit = how if isinstance(how, str) else in_group.unfit(layers)
        if unfit:
            raise NoBackendError(
                f"{type(module).__name__} has context parallel attention (enable_parallelism): {unfit}\n"
                "  what to do: use set_attention_backend of Diffusers on this model, or change what is named here"
            )
    if not settings_of(layers).strict:
        return
    parameter = next(module.parameters(), None)
    router = router_for(None if parameter is None or parameter.device.type == "meta" else parameter.device)
    named = set(named_backends(layers)) - {AUTO, AUTOTUNE}
    refused = {name: "; ".join(reasons) for name in sorted(named) if (reasons := router.unavailable(name))}
    if refused:
        raise NoBackendError(
            "\n".join(
                [
                    f"{layers[0].source}: strict is on, and {' and '.join(refused)} cannot run here",
                    f"  machine: {router.platform.describe()}",
                    *(f"  {name}: {reasons}" for name, reasons in refused.items()),
                    "  what to do: choose one that can run, or leave strict off to fall back",
                ]
            )
        )
