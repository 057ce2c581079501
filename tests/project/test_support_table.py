"""docs/backends.md: up to date, complete, and saying what the router says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from attention_backends.backends.engine.priorities import PRIORITIES
from attention_backends.backends.engine.router import Router
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.kernels.backend import Backend, Limits
from attention_backends.backends.values.grid import TokenGrid
from attention_backends.backends.values.limits import SHORT, GroupedHeads, HeadDim, HeadDimIn, Masks
from attention_backends.backends.values.options import Option
from attention_backends.backends.values.platform import Platform
from attention_backends.backends.values.request import DTYPES, MASK_KINDS, AttentionRequest
from attention_backends.devtools import commands
from attention_backends.devtools.pages import backends as support
from attention_backends.devtools.pages import limits as support_limits
from attention_backends.devtools.pages.backends import support_page
from syrupy.assertion import SnapshotAssertion

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "backends.md"


def _tables(text: str) -> dict[str, list[list[str]]]:
    """The rows of each table under its heading, without the head."""
    tables: dict[str, list[list[str]]] = {}
    for section in text.split("\n## ")[1:]:
        title, *lines = section.split("\n")
        rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("|")]
        tables[title] = rows[2:]
    return tables


def test_the_page_is_up_to_date() -> None:
    written = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    assert written == support_page(), "docs/backends.md is stale; write it with: python3 dev.py docs"


def test_every_backend_has_its_rows() -> None:
    tables = _tables(support_page())
    listed = [row[0] for row in tables["What there is"]]
    assert listed == [f"`{name}`" for name in BACKENDS]
    assert [row[0] for row in tables["What a call may be"]] == sorted(
        (row[0] for row in tables["What a call may be"]), key=listed.index
    )
    assert {row[0] for row in tables["What a call may be"]} == set(listed)


def test_routes_and_options_are_all_there() -> None:
    tables = _tables(support_page())
    assert [(row[0], row[4], row[5]) for row in tables["Routes"]] == [
        (route.title, route.evidence, route.source) for route in PRIORITIES
    ]
    assert [(row[0], row[1]) for row in tables["Options"]] == [
        (f"`{backend.id}`", f"`{option.name}`") for backend in BACKENDS.values() for option in backend.options
    ]


def test_no_torch_is_needed() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.path.insert(0, 'devtools/inside'); import with_package;"
        "with_package.load(); from attention_backends.devtools.pages.backends import support_page;"
        "print(len(support_page()))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 5000


# What a row says is what the router says.
class Sample(Backend):
    id = "sample"
    summary = "A sample | with a bar."
    kinds = ("cuda", "rocm", "cpu")
    min_capability = (8, 0)
    architectures = ("gfx942",)
    requires = ("flash-attn>=2.6.3",)
    options = (
        Option("share", float, 0.5, "How much.", minimum=0, maximum=1),
        Option("mode", str, "fast", "Which.", choices=("fast", "good")),
    )
    limits = Limits(HeadDim(max=128), Masks(("none", "bool")), GroupedHeads(taken=False))

    def capabilities(self, platform: Platform) -> tuple[tuple[int, int], ...]:
        return ((7, 5), (8, 0), (8, 6), (9, 0))

    def limits_on(self, platform: Platform) -> Limits:
        if platform.torch.startswith("2.6"):
            return self.limits.without(HeadDim).but(HeadDimIn((64,)))
        return self.limits.but(HeadDim(max=256)) if platform.capability == (9, 0) else self.limits

    def unavailable_reasons(self, platform: Platform) -> list[str]:
        return [reason for reason in super().unavailable_reasons(platform) if not reason.startswith("package")]


def test_machines_of_a_backend(snapshot: SnapshotAssertion) -> None:
    assert support_limits.runs_on(Sample()) == snapshot
    assert support_limits.runs_on(BACKENDS["torch_sdpa"]) == "everything"


def test_limits_that_differ_have_rows_of_their_own(snapshot: SnapshotAssertion) -> None:
    rows = support_limits.limit_rows(Sample())
    assert [(row[0], row[2]) for row in rows] == snapshot
    assert rows[0][1:6] == ("fp16, bf16", "to 128", "bool", "no", "equal lengths")


def test_options_in_words(monkeypatch: pytest.MonkeyPatch, snapshot: SnapshotAssertion) -> None:
    monkeypatch.setitem(BACKENDS, "sample", Sample())
    page = support_page()
    assert [
        line for line in page.splitlines() if line.startswith(("| `sample` | `share`", "| `sample` | `mode`"))
    ] == snapshot
    assert "\\| with a bar." in page


def test_a_new_backend_makes_the_page_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    before = support_page()
    monkeypatch.setitem(BACKENDS, "sample", Sample())
    assert support_page() != before


BUILT = list(BACKENDS)


def _named(places: str) -> set[Platform]:
    """The machines that a cell such as `CUDA sm80 to sm86, sm90; ROCm gfx942; CPU` names."""
    machines, cards = support_limits.MACHINES, [support_limits.card_name(card) for card in support_limits.CARDS]
    if places == "everything":
        return set(machines)
    found: set[str] = set()
    for part in places.split("; "):
        kind, _, names = part.partition(" ")
        for span in filter(None, names.split(", ")):
            first, _, last = span.partition(" to ")
            found |= set(cards[cards.index(first) : cards.index(last or first) + 1] if first in cards else [first])
        if not names:
            found |= {_name(machine) for machine in machines if machine.kind == kind.lower()}
    return {machine for machine in machines if _name(machine) in found}


def _name(machine: Platform) -> str:
    return support_limits.card_name(machine.capability) if machine.capability else machine.gfx or machine.kind


@pytest.mark.parametrize("backend", BUILT)
def test_the_machines_in_the_table_are_those_of_the_router(backend: str) -> None:
    able = {
        machine
        for machine in support_limits.MACHINES
        if any(not Router(one).unavailable(backend) for _, one in support_limits.equipped(BACKENDS[backend], machine))
    }
    assert _named(support_limits.runs_on(BACKENDS[backend])) == able


@pytest.mark.parametrize("backend", [name for name in BUILT if name != "flash_attn"])
def test_dtypes_in_the_table_are_those_of_the_router(backend: str) -> None:
    """On each machine that has it, some row lists just the dtypes that are not refused there."""
    short = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}
    listed = {frozenset(short.get(name, name) for name in row[1].split(", ")) for row in _rows(backend)}
    for machine in support_limits.MACHINES:
        for _, one in support_limits.equipped(BACKENDS[backend], machine):
            if Router(one).unavailable(backend):
                continue
            taken = {
                dtype
                for dtype in DTYPES
                if not any(
                    reason.startswith(f"does not support {dtype}")
                    for reason in Router(one).reasons_against(backend, AttentionRequest(1, 8, 256, 256, 64, dtype))
                )
            }
            assert taken in listed, (one.describe(), taken)


def _row_of(backend: str, machine: Platform, release: str) -> tuple[str, ...]:
    """The row that the table has for a machine with a release, as a reader finds it: by the words under `where`."""
    found = []
    for row in _rows(backend):
        for line in row[0].split("<br>"):
            version, colon, places = line.rpartition(": ")
            if not line or (version == release and (not places or machine in _named(places))):
                found.append(row)
            assert not colon or places
    assert len(found) == 1, (machine.describe(), release, [row[0] for row in found])
    return found[0]


def _head_dim_fits(cell: str, size: int, dtype: str) -> bool:
    """What the words of a head_dim cell say about one size."""
    if cell[0].isdigit():
        return str(size) in cell.split(", ")
    for part in cell.split(", "):
        numbers = [int(number) for number in re.findall(r"\d+", part)]
        in_dtypes = part.partition(" in ")[2]
        if part.startswith("above"):
            fits = size <= numbers[0] or size % numbers[1] == 0
        elif part.startswith("multiples"):
            fits = bool(in_dtypes and SHORT[dtype] not in in_dtypes) or size % numbers[0] == 0
        elif part.startswith("from"):
            fits = size >= numbers[0] and (len(numbers) < 2 or size <= numbers[1])
        else:
            assert part == "any" or part.startswith("to "), part
            fits = part == "any" or size <= numbers[0]
        if not fits:
            return False
    return True


def _length_fits(cell: str, kv_len: int, causal: bool) -> bool:
    """What the words of the last cell say about one number of keys."""
    for part in cell.split("; "):
        numbers = [int(number) for number in re.findall(r"\d+", part)]
        if part.startswith("kv_len from"):
            fits = kv_len >= numbers[0]
        elif part.startswith("kv_len to"):
            fits = kv_len <= numbers[0]
        elif part.startswith("kv_len a multiple"):
            fits = kv_len % numbers[0] == 0 or (causal and part.endswith("unless causal"))
        elif part.startswith("kv_len above"):
            fits = kv_len <= numbers[0] or kv_len % numbers[0] == 0
        else:
            fits = True
        if not fits:
            return False
    return True


def _masks_of(cell: str) -> set[str]:
    return set(MASK_KINDS) if cell == "all" else {"none", *(cell.split(", ") if cell != "no" else [])}


@pytest.mark.parametrize("backend", [name for name in BUILT if name != "flash_attn"])
def test_every_row_says_what_the_router_says(backend: str) -> None:
    """Head sizes, masks, lengths and dtypes, on each machine with each package that can serve it."""
    checked = 0
    for machine in support_limits.MACHINES:
        for release, one in support_limits.equipped(BACKENDS[backend], machine):
            router = Router(one)
            if router.unavailable(backend):
                continue
            _, dtypes, head_dim, masks, _, _, _, further = _row_of(backend, machine, release)
            dtype = next(name for name in DTYPES if SHORT.get(name, name) == dtypes.split(", ")[0])
            able = next(size for size in (64, 128) if _head_dim_fits(head_dim, size, dtype))
            call = AttentionRequest(1, 8, 256, 256, able, dtype)

            def refused(call: AttentionRequest, router: Router = router) -> bool:
                grid = TokenGrid(1, 1, call.q_len)  # the backends that need one say so in the last column
                return bool(router.reasons_against(backend, call._replace(grid=grid)))

            for size, each in product((4, 8, 12, 16, 17, 40, 64, 80, 96, 128, 160, 192, 256, 264, 512, 520), DTYPES):
                said = SHORT.get(each, each) in dtypes.split(", ")
                said = said and _head_dim_fits(head_dim, size, each)
                assert refused(call._replace(head_dim=size, dtype=each)) != said, (one.describe(), size, each)
            for mask in MASK_KINDS:
                assert refused(call._replace(mask=mask)) != (mask in _masks_of(masks)), (one.describe(), mask)
            for kv_len, causal in product((1, 2, 64, 77, 128, 520, 1024, 150_001), (False, True)):
                if causal and refused(call._replace(is_causal=True)):
                    continue
                asked = call._replace(q_len=kv_len, kv_len=kv_len, is_causal=causal, num_heads=1)
                assert refused(asked) != _length_fits(further, kv_len, causal), (one.describe(), kv_len, causal)
            batch = call._replace(batch=65, mask="bool")
            if "bool" in _masks_of(masks):
                assert refused(batch) == ("batch to 64 with a mask" in further)
            checked += 1
    assert checked


def test_a_row_that_said_something_else_would_be_seen() -> None:
    assert not _head_dim_fits("to 256, multiples of 8 in fp16 and bf16, multiples of 4 in fp32", 12, "float16")
    assert _head_dim_fits("to 256, multiples of 8 in fp16 and bf16, multiples of 4 in fp32", 12, "float32")
    assert not _head_dim_fits("from 16 to 256", 8, "float16")
    assert not _head_dim_fits("to 256, above 128 multiples of 128", 160, "bfloat16")
    assert not _length_fits("kv_len a multiple of 64; batch to 65535", 77, True)
    assert _length_fits("kv_len a multiple of 64 unless causal", 77, True)
    assert not _length_fits("kv_len above 512 a multiple of 512", 520, False)


def _rows(backend: str) -> list[tuple[str, ...]]:
    return support_limits.limit_rows(BACKENDS[backend])


def test_needs_name_what_is_missing() -> None:
    needs = {row[0].strip("`"): row[3] for row in _tables(support_page())["What there is"]}
    assert needs["flash_attn_2"] == "`flash-attn>=2.6.3`"
    assert needs["cudnn_attn"] == "`cuDNN>=9.5`"
    assert needs["torch_sdpa"] == "nothing"
    assert "`triton`" in needs["sage_attn"]
    assert "`torch>=2.6 (CPU)`" in needs["flex_attn"]
    assert support.INTRO.startswith("# Backends")


def test_dev_py_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ignored = shutil.ignore_patterns(".*", "__pycache__", "tests", "build", "weights", "*.png")
    copy = Path(shutil.copytree(ROOT, tmp_path / "pack", ignore=ignored))
    page = copy / "docs" / "backends.md"
    page.write_text("stale")
    monkeypatch.setattr(commands, "prepare", lambda root: Path(sys.executable))
    assert commands._run(copy, "docs", []) == 0
    assert page.read_text(encoding="utf-8") == support_page()


def test_dev_py_offers_it(snapshot: SnapshotAssertion) -> None:
    result = subprocess.run([sys.executable, "dev.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert "docs" in result.stdout
    refused = subprocess.run([sys.executable, "dev.py", "docs", "x"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1] == snapshot
