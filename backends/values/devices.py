"""Devices of packages beside torch (Ascend NPUs, XLA), and synchronisation of any device.

torch has NPUs only once torch_npu is imported, and XLA devices only through torch_xla. These are imported only if
installed and torch sees no accelerator, or if such a device is named.
"""

from __future__ import annotations

import gc
import logging
from importlib import import_module, metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

log = logging.getLogger("attention_backends")

BROUGHT_BY = {"npu": ("torch-npu", "torch_npu"), "xla": ("torch-xla", "torch_xla")}
"""Kind of device -> (distribution, module)."""


def brought(kind: str) -> bool:
    """Whether there is a device of this kind; imports its package if installed."""
    distribution, module = BROUGHT_BY[kind]
    try:
        metadata.version(distribution)
    except Exception:  # not installed, or invalid metadata
        return False
    try:
        import_module(module)
        return _npu_is_there() if kind == "npu" else _xla_is_there()
    except (Exception, SystemExit) as error:  # e.g. built for another torch, missing driver
        log.warning("%s is installed and cannot be used: %s: %s", distribution, type(error).__name__, error)
        return False


def _npu_is_there() -> bool:
    import torch

    there: bool = torch.npu.is_available()  # type: ignore[attr-defined]  # torch_npu puts it there
    return there


def _xla_is_there() -> bool:
    # XLA can also run on the CPU, for tests: that is no reason to leave torch's CPU kernels.
    return str(import_module("torch_xla.runtime").device_type() or "CPU").upper() != "CPU"


def kind_beside_torch() -> str | None:
    """`npu` or `xla`, the first with a device; None without."""
    return next((kind for kind in BROUGHT_BY if brought(kind)), None)


def device_named(text: str) -> torch.device:
    """torch's device of a name such as `cpu`, `cuda:1` or `npu`; imports its package.

    Raises:
        RuntimeError: torch knows no such device.
    """
    import torch

    kind = text.partition(":")[0].strip().lower()
    if kind in BROUGHT_BY:
        brought(kind)
    return torch.device(text)


def synchronise(device: torch.device) -> None:
    """Wait until the device is idle."""
    import torch

    if device.type == "xla":
        _synchronise_xla()
    elif device.type == "mps":
        torch.mps.synchronize()  # takes no device
    elif device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def release(device: torch.device) -> None:
    """Release torch's cached memory of the device."""
    import torch

    gc.collect()
    empty_cache = getattr(getattr(torch, device.type, None), "empty_cache", None)
    if empty_cache is not None:
        empty_cache()


def _synchronise_xla() -> None:
    """Run XLA's pending graph and wait: `torch_xla.sync` since 2.7, else `mark_step` and `wait_device_ops`."""
    package = import_module("torch_xla")
    if hasattr(package, "sync"):
        package.sync(wait=True)
        return
    model = import_module("torch_xla.core.xla_model")
    model.mark_step()
    model.wait_device_ops()
