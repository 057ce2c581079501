"""What a node will do before anything runs, as plain data; the page makes words of it.

Nothing is measured for it. A backend counts as faster where the platform's priorities put it first and say so on
measured or reported evidence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...backends.config import AttentionConfig
from ...backends.config.layers import resolve
from ...backends.config.names import AUTO, AUTOTUNE, COMFY, canonical
from ...backends.config.text import from_environment
from ...backends.doctor.install import package_that_helps
from ...backends.engine.router import Router
from ...backends.kernels.group import BackendGroup
from ...backends.measure.device_clock import DeviceClock
from ...backends.observe.advisories import for_family
from ...backends.observe.autotune.candidates import may_win
from ...backends.values.privacy import clean
from ...backends.values.reasons import known
from ...backends.values.request import AttentionRequest
from ...backends.values.tolerance import ACCURACY
from ..hook.comfy_functions import Started
from .answers import phrases_of

SAME_AS = {"attention_pytorch": "torch_sdpa", "attention_xformers": "xformers"}
"""ComfyUI's functions of which a backend runs the same kernels, beside those that `comfy_functions.KNOWN` names."""
USUAL = (64, 128)
"""Sizes of heads that every kernel for diffusion models takes."""
NOT_ALLOWED, NOT_INSTALLED = "not_allowed", "not_installed"


def forecast(
    router: Router,
    backend: str,
    accuracy: str,
    started: Started | None,
    environment: Callable[[], tuple[AttentionConfig, ...]] = from_environment,
    head_dims: tuple[int, ...] = (),
    family: str = "",
    recommended: bool = False,
) -> dict[str, Any]:
    """What a node with this backend and accuracy does on the router's machine.

    {"backend", "kind": "auto", "autotune" or "named", "takes", "accuracy", "source", "same", "without", "flag",
    "without_accuracy", "faster", "tries", "reasons", "phrases", "package", "by_model", "exceptions"}: `takes` is the
    backend that runs, None where the named one cannot; `by_model` whether the model's heads decided that. `without` is
    what this server runs without the node, by `flag`, and `same` whether that is the same kernel. `faster` is
    {"backend", "why", "accuracy"} or None. `tries` are autotune's candidates. `package` is what to install for a named
    backend, empty where nothing would help. `exceptions` names the calls of the model that run exactly instead, such as
    masked ones.

    Args:
        started: ComfyUI's own function; None outside of it.
        environment: the configurations that hold where the node says auto.
        head_dims: sizes of the heads of the node's model; empty where they are not known.
        family: of that model; empty where it is not known.
        recommended: whether the node makes the exceptions that are known for the family.

    Raises:
        UnknownBackendError: no such name.
        ValueError: no such accuracy.
    """
    if accuracy not in ACCURACY:
        raise ValueError(f"accuracy {accuracy[:40]!r} is not one of {', '.join(ACCURACY)}")
    asked, source = canonical(backend), ""
    if asked == AUTO:
        try:
            choice = resolve(environment(), "self", "self")
        except ValueError:
            choice = resolve((), "self", "self")  # the node says when it runs what is wrong with the variable
        if choice.asked is not None:
            asked, source = choice.asked, choice.source.partition(".")[0]
    named = asked not in (AUTO, AUTOTUNE)
    found = _named(router, asked, head_dims) if named else _chosen(router, asked, accuracy, head_dims)
    takes = found["takes"]
    kernel = router.backends.get(takes) if takes else None
    exceptions = _exceptions(family, {takes, *found.get("tries", ())}) if recommended else []
    return {
        "backend": canonical(backend),
        "source": source,
        "accuracy": kernel.accuracy if kernel is not None else None,
        **_without(takes, started),
        "faster": None,
        "tries": [],
        "reasons": [],
        "package": "",
        "by_model": False,
        "exceptions": exceptions,
        **found,
        "phrases": {**found.get("phrases", {}), **phrases_of(exceptions)},
    }


def _exceptions(family: str, may_run: set[str | None]) -> list[str]:
    """The calls of a family that run exactly where one of these backends would compute them."""
    return [known(one.what, "offer.") for one in for_family(family) if may_run & set(one.backends)]


def _named(router: Router, asked: str, head_dims: tuple[int, ...]) -> dict[str, Any]:
    reasons = router.unavailable(asked)
    if not reasons:
        reasons = _against(router, asked, head_dims)
        if not reasons:
            return {"kind": "named", "takes": asked}
        answer = {"reasons": clean(list(reasons)), "phrases": phrases_of(list(reasons))}
        return {"kind": "named", "takes": None, "by_model": True, **answer}
    helps = package_that_helps(router.backends[asked], router.platform) if asked in router.backends else ""
    answer = {"reasons": clean(list(reasons)), "phrases": phrases_of(list(reasons)), "package": helps}
    return {"kind": "named", "takes": None, **answer}


def _against(router: Router, name: str, head_dims: tuple[int, ...]) -> tuple[str, ...]:
    """Why a backend computes no call of a model with such heads; empty where it computes some, or nothing is known."""
    backend = router.backends.get(name)
    if backend is None:
        return ()
    dtype = "float32" if router.platform.kind == "cpu" else "bfloat16"

    def reasons(head_dim: int) -> tuple[str, ...]:
        request = AttentionRequest(1, 8, 4096, 4096, head_dim, dtype)
        return tuple(backend.unsupported_reasons(request, router.platform))

    if not head_dims or any(reasons(usual) for usual in USUAL):  # something else than the heads is in its way
        return ()
    found = [reasons(head_dim) for head_dim in head_dims]
    return tuple(dict.fromkeys(reason for one in found for reason in one)) if all(found) else ()


def _chosen(router: Router, asked: str, accuracy: str, head_dims: tuple[int, ...]) -> dict[str, Any]:
    lossy = router.priority.lossy if accuracy != "exact" else ()
    runs = [name for name in (*lossy, *router.priority.order) if not router.unavailable(name)]
    takes = next((name for name in runs if not _against(router, name, head_dims)), router.default_backend())
    found: dict[str, Any] = {"kind": AUTO if asked == AUTO else AUTOTUNE, "takes": takes}
    found["by_model"] = bool(runs) and takes != runs[0]
    if asked == AUTO:
        found["faster"] = _faster(router, takes, accuracy, head_dims)
    elif DeviceClock(router.platform.kind).measures_device_time:
        names = (name for name in router.backends if name != takes and may_win(router, name, accuracy))
        tried = (name for name in names if _is_there(router, name) and not _against(router, name, head_dims))
        found["tries"] = [takes, *tried]
    return found


def _is_there(router: Router, name: str) -> bool:
    """Whether a backend that is no group could run here, without loading it."""
    backend = router.backends[name]
    return not isinstance(backend, BackendGroup) and not backend.unavailable_reasons(router.platform)


def _faster(router: Router, takes: str, accuracy: str, head_dims: tuple[int, ...]) -> dict[str, str] | None:
    """The first backend that the priorities put before `takes` and that an installation or a permission would bring.

    What is installed comes first.
    """
    row = router.priority
    order = row.order if row.evidence != "assumed" else ()
    before = order[: order.index(takes)] if takes in order else order if takes not in row.order else ()
    lossy = row.lossy[: row.lossy.index(takes)] if takes in row.lossy else row.lossy
    if takes in row.lossy:
        before = ()
    found: list[dict[str, str]] = []
    for name in (*lossy, *before):
        backend = router.backends[name]
        if _against(router, name, head_dims):
            continue
        allowed = ACCURACY.index(backend.accuracy) <= ACCURACY.index(accuracy)
        if not allowed and not router.unavailable(name):
            return {"backend": name, "why": NOT_ALLOWED, "accuracy": backend.accuracy}
        if backend.unavailable_reasons(router.platform) and package_that_helps(backend, router.platform):
            found.append({"backend": name, "why": NOT_INSTALLED, "accuracy": backend.accuracy})
    return next(iter(found), None)


def _without(takes: str | None, started: Started | None) -> dict[str, Any]:
    """What runs without the node, and whether `takes` is the same."""
    if started is None:
        return {"same": None, "without": "", "flag": "", "without_accuracy": ""}
    function = started.function
    known = SAME_AS.get(function.name, function.id)
    name = function.name.removeprefix("attention_") if known == COMFY else known
    return {
        "same": takes == COMFY or (takes is not None and takes == known),
        "without": name,
        "flag": started.flag,
        "without_accuracy": function.accuracy,
    }
