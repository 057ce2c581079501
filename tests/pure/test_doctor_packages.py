"""What the doctor says of packages that are not what their names promise: written to disk, met in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from attention_backends.backends.doctor.doctor import Cards, cards_of
from attention_backends.backends.doctor.symbols import find, needs_of
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.values.platform import KINDS, Platform, parse_platform
from attention_backends.backends.values.reasons import reason_id
from packaging.requirements import Requirement
from syrupy.assertion import SnapshotAssertion

ROOT = Path(__file__).resolve().parents[2]
OTHER_TORCH = "flash_attn_2_cuda.cpython-312-x86_64-linux-gnu.so: undefined symbol: _ZN3c104cuda9SetDeviceEa"

ON_A_CARD = """
import importlib.util, json, sys
root = sys.argv[1]
spec = importlib.util.spec_from_file_location(
    "attention_backends", root + "/__init__.py", submodule_search_locations=[root]
)
sys.modules["attention_backends"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["attention_backends"])

import contextlib
from attention_backends.backends.doctor.doctor import examine
from attention_backends.backends.doctor.install import running_interpreter
from attention_backends.backends.kernels.registry import looked_for
from attention_backends.backends.values.platform import Platform, installed_packages
from attention_backends.backends.engine.router import Router

kind, card = sys.argv[2:4]
facts = {"gfx": card} if kind == "rocm" else {"capability": tuple(map(int, card.split(".")))}
packages = installed_packages(looked_for())
platform = Platform(kind, torch="2.11.0", cuda="13.0", cudnn=91002, packages=packages, os="linux", **facts)
with contextlib.redirect_stdout(sys.stderr):
    rows = examine(Router(platform), running_interpreter(), sys.argv[4:])
print(json.dumps({"backends": [row.as_dict() for row in rows]}))
"""


def install(site: Path, distribution: str, version: str, **modules: str) -> None:
    """Write a distribution; a module `a__b` is the file `a/b.py`, and `a__` the file `a/__init__.py`."""
    record = []
    for name, text in modules.items():
        parts = name.replace("__", "/").rstrip("/")
        path = site / (f"{parts}/__init__.py" if name.endswith("__") else f"{parts}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        record.append(path.relative_to(site).as_posix())
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{line},,\n" for line in [*record, f"{info.name}/METADATA"]))


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every package is there, and none is right."""
    site = tmp_path_factory.mktemp("broken site")
    install(site, "flash-attn", "2.8.3", flash_attn__=f"raise ImportError({OTHER_TORCH!r})")
    install(site, "flash-attn-3", "3.0.0")
    install(site, "flashinfer-python", "0.7.2", flashinfer__="print('a banner')\nraise SystemExit('no licence')")
    install(site, "triton", "3.6.0", triton__="")
    install(site, "sageattention", "2.2.0", sageattention__="def sageattn(): ...")
    install(site, "sageattn3", "1.0.0", sageattn3__="print('another banner')")
    install(site, "xformers", "0.0.35", xformers__="", xformers__ops="raise RuntimeError('0 active drivers')")
    install(site, "comfy-kitchen", "0.2.40", comfy_kitchen__="def __getattr__(name): raise OSError('no driver')")
    install(site, "aiter", "0.13.20191203", aiter__="def map(function, items): ...")
    return site


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Right packages under which others could be suspected."""
    site = tmp_path_factory.mktemp("other site")
    install(site, "flash-attn-4", "4.0.0b36", flash_attn__cute__="def flash_attn_func(): ...")
    install(site, "triton", "3.6.0", triton__="")
    names = ("sageattn", "sageattn_qk_int8_pv_fp16_cuda", "sageattn_qk_int8_pv_fp16_triton")
    install(site, "sageattention", "1.0.6", sageattention__="".join(f"def {name}(): ...\n" for name in names))
    return site


def rows(site: Path, *command: str) -> dict[str, dict[str, Any]]:
    """The rows that a fresh process prints as JSON, and nothing else on stdout."""
    paths = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH", ""))))
    environ = {**os.environ, "PYTHONPATH": paths, "ATTENTION_BACKENDS_CACHE": str(site / "cache")}
    done = subprocess.run([sys.executable, *command], env=environ, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return {row["id"]: row for row in json.loads(done.stdout)["backends"]}


@pytest.fixture(scope="module")
def everywhere(broken: Path) -> dict[str, dict[str, Any]]:
    """The command itself, on whatever machine this is."""
    pytest.importorskip("torch")
    return rows(broken, str(ROOT), "doctor", "--json")


@pytest.fixture(scope="module")
def on_hopper(broken: Path) -> dict[str, dict[str, Any]]:
    pytest.importorskip("torch")  # kernels that are loaded import it
    return rows(broken, "-c", ON_A_CARD, str(ROOT), "cuda", "9.0")


WRONG = [
    ("flash_attn_2", ["flash_attn.flash_attn_func"]),
    ("flash_attn_3", ["flash_attn_interface.flash_attn_func"]),
    ("flashinfer_attn", ["flashinfer.single_prefill_with"]),
    ("sage_attn", ["sageattention.sageattn_qk_int8_pv_fp16_triton", "sageattention.sageattn_qk_int8_pv_fp16_cuda"]),
    ("sage_attn_3", ["sageattn3.sageattn3_blackwell"]),
    ("xformers", ["xformers.ops.memory_eff"]),
    ("comfy_kitchen_int8", ["comfy_kitchen.int8_attention"]),
    ("aiter", ["aiter.flash_attn_func"]),
]


@pytest.mark.parametrize("where", ["everywhere", "on_hopper"])
@pytest.mark.parametrize(("backend", "missing"), WRONG)
def test_each_wrong_package_is_a_row_that_says_what_is_wrong(
    request: pytest.FixtureRequest,
    broken: Path,
    where: str,
    backend: str,
    missing: list[str],
    snapshot: SnapshotAssertion,
) -> None:
    row = request.getfixturevalue(where)[backend]
    assert not row["available"]
    assert row["symbols"]["problem"].replace(str(broken), "SITE") == snapshot
    assert len(row["symbols"]["missing"]) >= len(missing)
    for expected, found in zip(missing, row["symbols"]["missing"], strict=False):
        assert found.startswith(expected)
    assert set(row["symbols"]["missing"]) <= set(row["symbols"]["needed"])


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        ("flash_attn_2", OTHER_TORCH),
        ("flash_attn_3", "No module named 'flash_attn_interface'"),
        ("flashinfer_attn", "no licence"),
        ("sage_attn", "metadata says sageattention "),
        ("xformers", "0 active drivers"),
    ],
)
def test_on_the_card_it_was_meant_for_the_reason_is_what_it_raised(
    on_hopper: dict[str, dict[str, Any]], backend: str, reason: str
) -> None:
    assert on_hopper[backend]["reasons"][0].startswith(f"could not be loaded: {reason}")
    assert "does not load" in on_hopper[backend]["install"]


def test_the_asyncio_package_named_aiter_is_told_on_an_amd_card(broken: Path, snapshot: SnapshotAssertion) -> None:
    row = rows(broken, "-c", ON_A_CARD, str(ROOT), "rocm", "gfx942", "aiter")["aiter"]
    assert row["reasons"][0].partition(", and")[0] == snapshot
    assert row["symbols"]["problem"].partition("; ")[0] == snapshot


def test_flash_attn_4_alone_is_not_flash_attn_2(beside: Path, snapshot: SnapshotAssertion) -> None:
    found = rows(beside, "-c", ON_A_CARD, str(ROOT), "cuda", "9.0", "flash_attn_2", "flash_attn_4")
    assert found["flash_attn_4"]["available"]
    assert found["flash_attn_4"]["symbols"]["problem"] is None
    assert found["flash_attn_2"]["reasons"][0].partition(", and")[0] == snapshot
    problem = found["flash_attn_2"]["symbols"]["problem"]
    assert problem.replace(str(beside), "BESIDE") == snapshot


def test_sageattention_2_under_the_metadata_of_1(beside: Path, snapshot: SnapshotAssertion) -> None:
    row = rows(beside, "-c", ON_A_CARD, str(ROOT), "cuda", "8.9", "sage_attn")["sage_attn"]
    assert row["reasons"][0].startswith("could not be loaded: ")
    assert "metadata says sageattention 1.x" in row["reasons"][0]
    assert row["symbols"]["missing"] == []
    assert row["symbols"]["problem"].replace(str(beside), "BESIDE") == snapshot


def test_the_overview_tells_what_is_wrong_and_stays_silent_about_what_is_not_there(
    broken: Path, snapshot: SnapshotAssertion
) -> None:
    pytest.importorskip("torch")
    environ = {**os.environ, "PYTHONPATH": str(broken), "ATTENTION_BACKENDS_CACHE": str(broken / "cache")}
    done = subprocess.run(
        [sys.executable, str(ROOT), "doctor"], env=environ, capture_output=True, text=True, timeout=240
    )
    names = [line for line in done.stdout.splitlines() if line.startswith("    names: ")]
    assert next(line for line in names if "no licence" in line) == snapshot
    assert "banner" not in done.stdout
    assert "cards: " not in done.stdout
    assert "package torch-npu" not in done.stdout  # no trace of it: the reasons are enough


# The declarations


def test_every_declared_name_is_of_a_package_that_can_be_advised() -> None:
    for backend in BACKENDS.values():
        tops = {package.module.split(".")[0] for package in backend.packages} | {"torch"}
        assert {need.module.split(".")[0] for need in backend.symbols} <= tops, backend.id


def test_every_backend_of_a_package_declares_its_names() -> None:
    from attention_backends.backends.kernels.group import BackendGroup

    for backend in BACKENDS.values():
        if backend.packages and not isinstance(backend, BackendGroup):
            assert backend.symbols, backend.id


def test_the_version_decides_which_names_are_needed() -> None:
    def names(packages: str) -> tuple[str, ...]:
        (need,) = needs_of(BACKENDS["sage_attn"], parse_platform(f"cuda:8.9,packages={packages}"))
        return need.names

    assert names("sageattention==1.0.6") == ("sageattn",)
    assert "sageattn_qk_int8_pv_fp16_triton" in names("sageattention==2.2.0")
    assert "sageattn_qk_int8_pv_fp16_triton" in names("")


def test_a_backend_without_a_package_needs_no_names() -> None:
    finding = find(BACKENDS["torch_sdpa"], Platform("cpu"))
    assert (finding.needed, finding.missing, finding.problem) == ((), (), "")


def _declared() -> list[Any]:
    from kernel_machines import MACHINES

    cases = {}
    for machine in MACHINES:
        described = parse_platform(f"cuda:9.0,packages={';'.join(machine.packages.split())}")
        for need in needs_of(BACKENDS[machine.backend], described):
            for name in need.names:
                cases[machine.backend, need.module, name, machine.packages] = machine
    return [pytest.param(machine, *key[1:3], id=" ".join(key[:3:2])) for key, machine in cases.items()]


@pytest.mark.parametrize(("on", "module", "name"), _declared())
def test_a_kernel_without_one_of_its_declared_names_does_not_load(
    monkeypatch: pytest.MonkeyPatch, on: Any, module: str, name: str
) -> None:
    pytest.importorskip("torch")
    from fakes import machine

    router = machine(monkeypatch, on.packages, on.capability)
    assert find(BACKENDS[on.backend], router.platform).missing == ()
    monkeypatch.delattr(sys.modules[module], name)
    assert find(BACKENDS[on.backend], router.platform).missing == (f"{module}.{name}",)
    assert router.unavailable(on.backend), f"{name} is declared, and not needed to load"


# Cards


@pytest.mark.parametrize(
    ("backend", "machine"),
    [
        ("torch_sdpa", "cpu"),
        ("cudnn_attn", "cpu"),
        ("flash_attn_2", "mps"),
        ("flash_attn_3", "cuda:8.9"),
        ("flash_attn", "cuda:8.9"),
        ("sage_attn", "cuda:8.9,packages=sageattention==2.2.0"),
        ("sage_attn", "cuda:8.9,packages=sageattention==1.0.6"),
        ("sage_attn_3", "cpu"),
        ("aiter", "cpu"),
    ],
)
def test_the_cards_in_words(backend: str, machine: str, snapshot: SnapshotAssertion) -> None:
    assert cards_of(BACKENDS[backend], parse_platform(machine)).text == snapshot


def test_the_cards_as_data() -> None:
    cards = cards_of(BACKENDS["flash_attn_2"], Platform("cpu")).as_dict()
    assert cards == {
        "kinds": ["cuda", "rocm"],
        "min_capability": "8.0",
        "capabilities": None,
        "architectures": ["gfx90a", "gfx942", "gfx950"],
        "members": [],
    }
    assert Cards(KINDS).text == "any device"


CARDS = [f"cuda:{card}" for card in ("7.0", "7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "12.0", "12.1")]
CARDS += [f"rocm:{gfx}" for gfx in ("gfx90a", "gfx942", "gfx950", "gfx1030", "gfx1100", "gfx1201")]


@pytest.mark.parametrize("backend_id", BACKENDS)
def test_the_cards_that_are_shown_are_those_that_are_refused_by_no_check(backend_id: str) -> None:
    backend = BACKENDS[backend_id]
    if cards_of(backend, Platform("cpu")).members:
        return
    for card in CARDS:
        platform = parse_platform(card)
        cards = cards_of(backend, platform)
        if platform.kind not in cards.kinds:
            continue
        if platform.kind == "rocm":
            shown = cards.architectures is None or platform.gfx in cards.architectures
        else:
            dotted = card.removeprefix("cuda:")
            enough = backend.min_capability is None or platform.capability >= backend.min_capability
            shown = enough and (cards.capabilities is None or dotted in cards.capabilities)
        about_cards = ("capability", "architecture", "device", "flash_triton")
        refused = [why for why in backend.unavailable_reasons(platform) if reason_id(why).startswith(about_cards)]
        assert shown == (not refused), (card, cards.text, refused)


# Versions


@pytest.mark.parametrize(
    ("backend_id", "package", "accepted", "refused"),
    [
        ("flash_attn_2", "flash-attn", ("2.6.3", "2.8.3.post2"), ("2.6.2", "1.0.9")),
        ("sage_attn", "sageattention", ("1.0.6", "2.1.1", "2.2.0"), ("1.0.5", "2.0.0", "2.0.1", "2.1.0")),
        *(
            (name, "sageattention", ("2.1.1", "2.2.0+cu130torch2.9.0andhigher.post4"), ("1.0.6", "2.0.1", "2.1.0"))
            for name in ("sage_fp16_cuda", "sage_fp16_triton", "sage_fp8_cuda", "sage_fp8_sm90")
        ),
        ("xformers", "xformers", ("0.0.29", "0.0.35"), ("0.0.28.post3",)),
        ("aiter", "amd-aiter", ("0.1.5", "0.1.7.post2.dev18"), ("0.1.4",)),
        ("xla_flash", "torch-xla", ("2.3.0", "2.9.0"), ("2.2.0",)),
        ("flex_attn", "torch", ("2.5.0", "2.11.0"), ("2.4.1",)),
    ],
)
def test_the_lowest_version_is_exactly_the_one_agreed(
    backend_id: str, package: str, accepted: tuple[str, ...], refused: tuple[str, ...]
) -> None:
    backend = BACKENDS[backend_id]
    needs = [Requirement(need) for need in backend.requires if Requirement(need).name == package]
    assert needs, f"{backend_id} requires nothing of {package}"

    def met(version: str) -> bool:
        return all(need.specifier.contains(version, prereleases=True) for need in needs)

    assert [version for version in accepted if not met(version)] == []
    assert [version for version in refused if met(version)] == []


@pytest.mark.parametrize(("torch", "refused"), [("2.4.1", True), ("2.5.0", False)])
def test_flex_attention_asks_the_torch_that_is_there(torch: str, refused: bool) -> None:
    reasons = BACKENDS["flex_attn"].unavailable_reasons(
        parse_platform(f"cuda:9.0,torch={torch},packages=triton==3.6.0")
    )
    assert any("torch" in reason for reason in reasons) == refused
