"""The state of every backend on this machine as rows: available or why not, version, file, how to get it, the names
that it needs from its package, its cards, and what a probe found.

Asking loads each kernel's package; what it raises becomes the row's reason. A probe also runs each kernel, in
a separate process, and only on request. The command line prints the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from ..engine.router import Router
from ..kernels.backend import Backend
from ..kernels.group import BackendGroup
from ..kernels.registry import detect, looked_for
from ..measure import remembered
from ..measure.remembered import Outcome
from ..values.platform import KINDS, Platform, dotted, installed_packages
from ..values.reasons import Reason, error_text
from . import symbols
from .install import Advice, Interpreter, how_to_get
from .symbols import Finding

NO_TORCH = "run this with the interpreter that runs ComfyUI: this one has no torch that can be imported"


@dataclass(frozen=True)
class Cards:
    """The cards that a backend has kernels for, as it declares them; None means no limit of that kind."""

    kinds: tuple[str, ...]
    min_capability: str | None = None
    capabilities: tuple[str, ...] | None = None
    architectures: tuple[str, ...] | None = None
    members: tuple[str, ...] = ()
    """The members of a backend group, each with its own cards."""

    @property
    def text(self) -> str:
        """One line, e.g. `CUDA 8.0 and newer; ROCm gfx90a, gfx942`."""
        if self.members:
            return f"those of {', '.join(self.members)}"
        if set(self.kinds) == set(KINDS):
            return "any device"
        words = {"cuda": "CUDA, any card", "rocm": "ROCm, any card"}
        if self.capabilities is not None:
            words["cuda"] = f"CUDA {', '.join(self.capabilities)}"
        elif self.min_capability is not None:
            words["cuda"] = f"CUDA {self.min_capability} and newer"
        if self.architectures is not None:
            words["rocm"] = f"ROCm {', '.join(self.architectures)}"
        return "; ".join(words.get(kind, kind.upper()) for kind in self.kinds) or "none"

    def as_dict(self) -> dict[str, object]:
        lists = {"capabilities": self.capabilities, "architectures": self.architectures}
        return {
            "kinds": list(self.kinds),
            "min_capability": self.min_capability,
            **{name: None if cards is None else list(cards) for name, cards in lists.items()},
            "members": list(self.members),
        }


@dataclass(frozen=True)
class Row:
    """One backend. `reasons` is empty when it is available; `advice` says how to get it when it is not."""

    id: str
    accuracy: str
    reasons: tuple[str, ...]
    version: str | None
    """Name and version of the package that computes, e.g. `flash-attn 2.8.3`; None when it is not installed."""
    file: str | None
    advice: Advice | None
    cards: Cards
    symbols: Finding
    probed: Outcome | None = None
    """What a probe found in this environment, now or earlier; None where none was run."""

    @property
    def available(self) -> bool:
        return not self.reasons

    def as_dict(self) -> dict[str, object]:
        """The row as plain data. `install` is a command, or where to look, or why nothing would help."""
        return {
            "id": self.id,
            "accuracy": self.accuracy,
            "available": self.available,
            "reasons": list(self.reasons),
            "version": self.version,
            "file": self.file,
            "install": self.advice.text if self.advice else None,
            "note": (self.advice.note or None) if self.advice else None,
            "symbols": self.symbols.as_dict(),
            "cards": self.cards.as_dict(),
            "probed": asdict(self.probed) if self.probed else None,
        }


def this_machine() -> tuple[Platform, str | None]:
    """The running machine, and why torch cannot be used there if it cannot."""
    try:
        return detect(), None
    except Exception as error:  # a missing or damaged torch is a result, not a crash
        return Platform("cpu", packages=installed_packages(looked_for())), f"torch: {type(error).__name__}: {error}"


def why_no_card(platform: Platform) -> Reason | None:
    """Why torch finds only the CPU here, which no kernel package can change; None if it finds an accelerator."""
    if platform.kind != "cpu" or platform.os == "darwin":
        return None
    import torch

    built_for = torch.version.cuda or torch.version.hip
    if built_for is None:
        return Reason("torch.cpu_only")
    return Reason("torch.no_gpu", built_for=f"{'CUDA' if torch.version.cuda else 'ROCm'} {built_for}")


def examine(
    router: Router, interpreter: Interpreter, ids: Iterable[str] = (), without_torch: str | None = None
) -> list[Row]:
    """A row for each backend of `ids`, or for all of them.

    Args:
        without_torch: why torch cannot be imported; then nothing is available and nothing is asked.
    """
    rows = []
    for backend_id in tuple(ids) or tuple(router.backends):
        backend = router.backends[backend_id]
        probed = remembered.recall(backend_id, router.platform)
        if without_torch is None:
            reasons, advice = _ask(router, backend_id, interpreter)
            names = _names(backend, router.platform, probed)
        else:
            reasons, advice = (without_torch,), Advice("nothing", NO_TORCH)
            names = symbols.without_import(backend, router.platform, "not looked for: there is no torch")
        version, module = made_of(backend, router.platform)
        file, cards = module and file_of(module), cards_of(backend, router.platform)
        rows.append(Row(backend_id, backend.accuracy, reasons, version, file, advice, cards, names, probed))
    return rows


def probe_all(
    router: Router, ids: Iterable[str], probe: Callable[[str], Outcome], say: Callable[[str], None]
) -> dict[str, Outcome]:
    """Run `probe` on each backend whose packages and card are there, and remember what it found.

    Nothing is loaded in this process: a package that crashes while it is imported does so in the probe's own process.
    """
    outcomes = {}
    for backend_id in tuple(ids) or tuple(router.backends):
        try:
            missing = router.backends[backend_id].unavailable_reasons(router.platform)
        except Exception as error:  # as in a row
            missing = [Reason("asking", error=error_text(error))]
        if missing:
            outcomes[backend_id] = Outcome("unavailable", "; ".join(missing))
            continue
        if router.backends[backend_id].hosted:
            outcomes[backend_id] = Outcome("untested", "runs inside ComfyUI only")
            continue
        say(f"probing {backend_id} ...")
        outcomes[backend_id] = probe(backend_id)
        remembered.remember({backend_id: outcomes[backend_id]}, router.platform)  # at once: it may be the last
    return outcomes


def cards_of(backend: Backend, platform: Platform) -> Cards:
    """The cards that a backend declares, for the versions that are installed."""
    if isinstance(backend, BackendGroup):
        return Cards(backend.kinds, members=tuple(member.id for member in backend.every_member()))
    cards = backend.capabilities(platform)
    least = dotted(backend.min_capability) if backend.min_capability else None
    return Cards(backend.kinds, least, None if cards is None else tuple(map(dotted, cards)), backend.architectures)


def _names(backend: Backend, platform: Platform, probed: Outcome | None) -> Finding:
    if isinstance(backend, BackendGroup) or backend.origin(platform):
        return Finding()  # members of a group have their own rows; code from the Hub was loaded from there
    if probed is not None and probed.status in ("crashed", "hung"):
        return symbols.without_import(backend, platform, f"not looked for: a probe {probed.summary}")
    return symbols.find(backend, platform)


def _ask(router: Router, backend_id: str, interpreter: Interpreter) -> tuple[tuple[str, ...], Advice | None]:
    try:
        reasons = router.unavailable(backend_id)
        if not reasons:
            return (), None
        return reasons, how_to_get(router.backends[backend_id], router.platform, interpreter)
    except Exception as error:  # a check that itself fails is a row too
        return (Reason("asking", error=error_text(error)),), None


def made_of(backend: Backend, platform: Platform) -> tuple[str | None, str | None]:
    """The installed package that computes, with its version, and the module to look for."""
    origin = backend.origin(platform)
    if origin is not None:
        return origin, None
    for package in backend.packages:
        version = platform.version(package.distribution)
        if version is not None:
            return f"{package.distribution} {version}", package.module
    if backend.hosted or backend.packages:
        return None, None
    return (f"torch {platform.torch}" if platform.torch else None), "torch"


def file_of(module: str) -> str | None:
    """The file that importing `module` would read, found without importing anything; None when there is none."""
    top, *rest = module.split(".")
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest and spec.origin:
        return spec.origin
    for folder in spec.submodule_search_locations or ():
        path = Path(folder, *rest)
        for candidate in (path / "__init__.py", path.with_suffix(".py"), path):
            if candidate.exists():
                return str(candidate)
    return None
