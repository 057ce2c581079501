"""The doctor's rows, and its advice: exact commands that never change torch, or a page with the tags to look for."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from attention_backends.backends.doctor.doctor import NO_TORCH, examine, file_of, why_no_card
from attention_backends.backends.doctor.install import Advice, Interpreter, how_to_get, running_interpreter
from attention_backends.backends.engine.router import Router
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.kernels.backend import Backend, Kernel
from attention_backends.backends.values.package import Package
from attention_backends.backends.values.platform import Platform, parse_platform
from packaging.requirements import Requirement
from syrupy.assertion import SnapshotAssertion

LINUX = Interpreter("/opt/comfy/venv/bin/python", "cp312", "linux_x86_64")
WINDOWS = Interpreter(r"C:\ComfyUI_windows_portable\python_embeded\python.exe", "cp312", "win_amd64")
SPACED = Interpreter(r"C:\Program Files\ComfyUI\python.exe", "cp312", "win_amd64")
TRITON = "packages=triton==3.6.0"


class Fake(Backend):
    def __init__(self, backend_id: str, *requires: str, **declared: object) -> None:
        self.id = backend_id  # type: ignore[misc]
        self.requires = requires  # type: ignore[misc]
        self.packages = BACKENDS[backend_id].packages if backend_id in BACKENDS else ()  # type: ignore[misc]
        for name, value in declared.items():
            setattr(self, name, value)

    def load(self, platform: Platform) -> Kernel:
        raise ImportError("undefined symbol: _ZN3c10")


def advice(backend: Fake, machine: str, interpreter: Interpreter = LINUX) -> Advice:
    return how_to_get(backend, parse_platform(machine), interpreter)


FLASH_2 = Fake("flash_attn_2", "flash-attn>=2.6.3", min_capability=(8, 0))
FLASH_4 = Fake("flash_attn_4", "flash-attn-4>=4.0.0b1")
FLASHINFER = Fake("flashinfer_attn", "flashinfer-python>=0.6")
SAGE = Fake("sage_attn", "sageattention>=1.0.6")
SAGE_2 = Fake("sage_fp8_cuda", "sageattention>=2.1.1")
SAGE_3 = Fake("sage_attn_3", "sageattn3", min_capability=(10, 0))
XFORMERS = Fake("xformers", "xformers>=0.0.29")
AITER = Fake("aiter", "amd-aiter>=0.1.5", kinds=("rocm",))


@pytest.mark.parametrize(
    ("backend", "machine", "command"),
    [
        (SAGE, f"cuda:8.9,{TRITON}", "--no-deps sageattention==1.0.6"),
        (XFORMERS, "cuda:8.6,torch=2.10.0,cuda=12.8", "--no-deps xformers==0.0.35"),
        (XFORMERS, "cuda:8.6,torch=2.9.1,cuda=12.8", "--no-deps xformers==0.0.33.post2"),
        (XFORMERS, "cuda:8.6,torch=2.8.0,cuda=12.6", "--no-deps xformers==0.0.32.post2"),
        (FLASHINFER, "cuda:12.0,torch=2.11.0", "flashinfer-python==0.7.2.post1 torch==2.11.0"),
        (FLASH_4, "cuda:9.0,torch=2.11.0,cuda=13.0", "'flash-attn-4[cu13]==4.0.0b36' torch==2.11.0"),
        (FLASH_4, "cuda:9.0,torch=2.10.0,cuda=12.8", "flash-attn-4==4.0.0b36 torch==2.10.0"),
        (AITER, "rocm:gfx942", "amd-aiter==0.1.7.post2.dev18"),
    ],
)
def test_the_exact_command_where_one_is_safe(backend: Fake, machine: str, command: str) -> None:
    found = advice(backend, machine)
    assert (found.kind, found.text) == ("command", f"{LINUX.path} -m pip install {command}")


@pytest.mark.parametrize(
    ("backend", "machine", "interpreter", "words"),
    [
        (FLASH_2, "cuda:8.9,torch=2.11.0", LINUX, "https://github.com/Dao-AILab/flash-attention/releases"),
        (FLASH_2, "cuda:8.9,os=windows", WINDOWS, "https://github.com/Dao-AILab/flash-attention/releases"),
        (SAGE_2, "cuda:8.9", LINUX, "version 2 from https://github.com/thu-ml/SageAttention"),
        (SAGE_2, "cuda:8.9,os=windows", WINDOWS, "https://github.com/woct0rdho/SageAttention/releases"),
        (SAGE, "cuda:8.9,os=windows", WINDOWS, "https://github.com/woct0rdho/SageAttention/releases"),
        (SAGE_3, "cuda:12.0", LINUX, "https://github.com/thu-ml/SageAttention/tree/main/sageattention3_blackwell"),
        (XFORMERS, "cuda:8.6,torch=2.11.0,cuda=13.0", LINUX, "https://github.com/facebookresearch/xformers"),
        (XFORMERS, "cuda:8.6,torch=2.7.1,cuda=12.8", LINUX, "https://github.com/facebookresearch/xformers"),
    ],
)
def test_elsewhere_the_page_and_the_tags(
    backend: Fake, machine: str, interpreter: Interpreter, words: str, snapshot: SnapshotAssertion
) -> None:
    platform = parse_platform(machine)
    found = advice(backend, machine, interpreter)
    assert found.kind == "page"
    assert words in found.text
    assert found.text == snapshot
    torch = ".".join(platform.torch.split(".")[:2])
    for tag in (interpreter.python, f"torch {torch}", f"CUDA {platform.cuda}", interpreter.machine, platform.sm):
        assert tag in found.text


def test_windows_is_told_which_triton_belongs_to_its_torch() -> None:
    found = advice(SAGE_2, "cuda:8.9,torch=2.9.1,os=windows", WINDOWS)
    assert f"{WINDOWS.path} -m pip install triton-windows==3.5.*" in found.note
    unknown = advice(SAGE_2, "cuda:8.9,torch=2.99.0,os=windows", WINDOWS)
    assert "pip install triton-windows" not in unknown.note
    assert "https://github.com/triton-lang/triton-windows" in unknown.note
    there = advice(SAGE_2, "cuda:8.9,os=windows,packages=triton-windows==3.6.0", WINDOWS)
    assert "triton-windows" not in there.note


@pytest.mark.parametrize(
    ("backend", "machine"),
    [
        pytest.param(FLASH_2, "cuda:7.5", id="an old card"),
        pytest.param(FLASH_2, "mps", id="Apple"),
        pytest.param(SAGE, "cpu", id="no card"),
        pytest.param(SAGE_3, "cuda:8.9", id="an Ada card"),
        pytest.param(AITER, "cuda:9.0", id="no AMD card"),
        pytest.param(FLASHINFER, "cuda:8.9,os=windows", id="Windows"),
        pytest.param(Fake("sdpa_flash", kinds=("cuda",)), "xpu", id="Intel"),
    ],
)
def test_nothing_is_advised_where_no_package_would_help(
    backend: Fake, machine: str, snapshot: SnapshotAssertion
) -> None:
    found = advice(backend, machine)
    assert found.kind == "nothing"
    assert found.text == snapshot


def test_a_family_gets_the_member_that_the_card_can_run(snapshot: SnapshotAssertion) -> None:
    class Family(Fake):
        def unavailable_reasons(self, platform: Platform) -> list[str]:
            member = "flash-attn-4" if platform.architecture == "Blackwell" else "flash-attn"
            return [] if platform.version(member) else [f"package {member} is not installed"]

    family = Family("flash_attn")
    assert "flash-attn-4" in advice(family, "cuda:12.0").text
    assert advice(family, "cuda:8.9").text.startswith("take a wheel for ")
    nowhere = advice(family, "cuda:12.0,os=windows", WINDOWS)
    assert nowhere.text == snapshot


MACHINES = [
    (f"{card},torch={torch},cuda={cuda},os={system}{packages}", interpreter)
    for card in ("cuda:7.5", "cuda:8.0", "cuda:8.9", "cuda:9.0", "cuda:10.0", "cuda:12.0", "rocm:gfx942", "npu", "xla")
    for torch, cuda in (("2.6.0", "12.4"), ("2.8.0", "12.8"), ("2.10.0", "12.8"), ("2.11.0", "13.0"))
    for system, interpreter, packages in (
        ("linux", LINUX, f",{TRITON}"),
        ("linux", Interpreter("/usr/bin/python3", "cp313", "linux_aarch64"), f",{TRITON}"),
        ("windows", SPACED, ""),
    )
]


@pytest.mark.parametrize("backend_id", [backend.id for backend in BACKENDS.values() if backend.packages])
def test_no_command_can_change_torch_or_is_known_to_fail(backend_id: str) -> None:
    packages = BACKENDS[backend_id].packages
    distributions = {package.distribution for package in packages}
    # One without arguments is sources alone, or nothing, on PyPI.
    installable = {package.distribution for package in packages if package.arguments is not Package.arguments}
    without_torch = {package.distribution for package in packages if not package.declares_torch}

    class Wants(Fake):
        def unavailable_reasons(self, platform: Platform) -> list[str]:
            return [] if any(platform.version(name) for name in distributions) else ["not installed"]

    commands = set()
    for machine, interpreter in MACHINES:
        platform = parse_platform(machine)
        found = how_to_get(Wants(backend_id), platform, interpreter)
        assert found.kind in ("command", "page", "nothing")
        assert found.text.isascii()
        if found.kind == "command":
            commands.add((found.text, platform))
    for command, platform in commands:
        words = shlex.split(command)
        assert words[1:4] == ["-m", "pip", "install"]
        arguments = words[4:]
        names = {Requirement(word).name for word in arguments if not word.startswith("-")}
        assert "--no-deps" in arguments or f"torch=={platform.torch}" in arguments or names <= without_torch
        assert names <= installable | {"torch"}
        assert "--upgrade" not in arguments
        assert "--force-reinstall" not in arguments


def test_a_path_with_spaces_is_quoted_for_its_shell() -> None:
    found = advice(SAGE_2, "cuda:8.9,os=windows", SPACED)
    assert found.text.endswith(r'"C:\Program Files\ComfyUI\python.exe" -m pip install --no-deps WHEEL')
    spaced = Interpreter("/home/a b/bin/python", "cp312", "linux_x86_64")
    assert advice(SAGE, f"cuda:8.9,{TRITON}", spaced).text.startswith("'/home/a b/bin/python' -m pip install ")


@pytest.mark.parametrize("why", ["has no pip", "belongs to the operating system, which forbids pip in it"])
def test_no_command_for_an_interpreter_that_pip_cannot_install_into(why: str, snapshot: SnapshotAssertion) -> None:
    found = advice(SAGE, f"cuda:8.9,{TRITON}", LINUX._replace(refuses=why))
    assert found.kind == "page"
    assert why in found.text
    assert found.text == snapshot
    assert "pip install" not in found.text


def test_every_package_that_a_backend_requires_can_be_advised() -> None:
    triton = {"triton", "triton-windows", "torch"}  # torch is ComfyUI's own; Triton comes with it, or in the note
    for backend in BACKENDS.values():
        known = {package.distribution for package in backend.packages} | triton
        assert {Requirement(need).name for need in backend.requires} <= known, backend.id


# Rows


def test_a_row_for_each_backend_with_reasons_version_and_file(snapshot: SnapshotAssertion) -> None:
    rows = {row.id: row.as_dict() for row in examine(Router(Platform("cpu", torch="2.11.0")), LINUX)}
    assert list(rows) == list(BACKENDS)
    for row in rows.values():
        assert row["available"] == (not row["reasons"])
        assert (row["install"] is None) == row["available"]
    assert rows["cudnn_attn"]["reasons"] == snapshot


def test_what_is_part_of_torch_shows_torch_and_its_file() -> None:
    pytest.importorskip("torch")
    (row,) = examine(Router(Platform("cpu", torch="2.11.0")), LINUX, ["torch_sdpa"])
    assert (row.available, row.version) == (True, "torch 2.11.0")
    assert row.file == sys.modules["torch"].__file__
    assert row.advice is None


def test_a_package_that_is_there_but_does_not_load_is_a_row(snapshot: SnapshotAssertion) -> None:
    platform = Platform("cuda", (8, 9), torch="2.11.0", cuda="13.0", packages=(("flash-attn", "2.8.3"),), os="linux")
    (row,) = examine(Router(platform, {"flash_attn_2": FLASH_2}), LINUX)
    assert row.reasons == snapshot
    assert row.version == "flash-attn 2.8.3"
    assert row.advice is not None
    assert row.advice.text == snapshot
    assert "torch 2.11" in row.advice.text


def test_a_check_that_itself_raises_is_a_row(snapshot: SnapshotAssertion) -> None:
    class Raises(Fake):
        def unavailable_reasons(self, platform: Platform) -> list[str]:
            raise OSError("driver library is gone")

    (row,) = examine(Router(Platform("cpu"), {"sage_attn": Raises("sage_attn")}), LINUX)
    assert row.reasons == snapshot


def test_without_torch_every_row_says_so_and_nothing_is_loaded(snapshot: SnapshotAssertion) -> None:
    rows = examine(Router(Platform("cpu")), LINUX, without_torch="torch: ModuleNotFoundError: No module named 'torch'")
    assert {row.reasons for row in rows} == snapshot
    assert {row.advice for row in rows} == {Advice("nothing", NO_TORCH)}


def test_files_are_found_without_importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ab_broken").mkdir()
    (tmp_path / "ab_broken" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "ab_space" / "cute").mkdir(parents=True)
    (tmp_path / "ab_space" / "cute" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "ab_single.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert file_of("ab_broken") == str(tmp_path / "ab_broken" / "__init__.py")
    assert file_of("ab_space.cute") == str(tmp_path / "ab_space" / "cute" / "__init__.py")
    assert file_of("ab_single") == str(tmp_path / "ab_single.py")
    assert file_of("ab_broken.missing") is None
    assert file_of("ab_nowhere") is None
    assert not {name for name in sys.modules if name.startswith("ab_")}


def test_the_running_interpreter() -> None:
    here = running_interpreter()
    assert here.path == sys.executable
    assert here.python == f"cp{sys.version_info[0]}{sys.version_info[1]}"
    assert "-" not in here.machine
    assert "." not in here.machine


def test_a_cpu_only_torch_is_named_as_the_cause() -> None:
    torch = pytest.importorskip("torch")
    assert why_no_card(Platform("cuda")) is None
    said = why_no_card(Platform("cpu", os="linux")) or ""
    cpu_build = torch.version.cuda is None and torch.version.hip is None
    assert ("CPU-only" in said) == cpu_build
    assert ("finds no card" in said) != cpu_build
