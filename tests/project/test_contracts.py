"""`dev.py contracts`: reading sources in place, and comparing them with what kernels use and fakes declare."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.sparse.executors import OF_PACKAGES
from attention_backends.devtools.contracts import compare, index, page, signatures, systems, uses
from attention_backends.devtools.contracts.compare import ABSENT, DIFFERENT, SAME, UNREAD, Row
from attention_backends.devtools.contracts.signatures import Function, Parameter, Sources, Thing
from packaging.version import Version

DECLARED = (*BACKENDS.values(), *(executor.declared for executor in OF_PACKAGES))
FILES = {
    "kern/__init__.py": """
from .core import *
from ._api import attend as attention
from other import far
flag = 1
""",
    "kern/core.py": """
try:
    from ._c import fast
except ImportError:
    fast = None
class Wrapper(Base):
    pass
class Lists(NamedTuple):
    counts: Tensor
    size: int | None = None
class Base:
    def __init__(self, workspace, layout='NHD'): ...
    @staticmethod
    def free(x): ...
    def run(self, q, *, lse=False):
        return (q, 1) if lse else q
""",
    "kern/_api.py": """
def attend(q, k, v, scale: float = 1.0, *, mask=None, **extra) -> Tensor:
    return Fn.apply(q)
class Fn:
    @staticmethod
    def forward(ctx, q):
        out, lse = compute(q)
        return out, lse
""",
    "torch/__init__.py": "",
    signatures.SCHEMAS: "- func: _op(Tensor query, Tensor? mask=None, int[2] window=[-1, 1], *, float? scale=None)"
    " -> (Tensor output, Tensor lse)\n",
}


def wheel(files: dict[str, str]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return made.getvalue()


@pytest.fixture
def sources() -> Sources:
    return Sources(index.Zipped(io.BytesIO(wheel(FILES))))


def function(sources: Sources, name: str) -> Function:
    found = sources.find(name)
    assert isinstance(found, Function), found
    return found


def test_names_are_followed_to_their_definitions(sources: Sources) -> None:
    attend = function(sources, "kern:attention")
    assert [one.name for one in attend.parameters] == ["q", "k", "v", "scale", "mask", "extra"]
    assert attend.parameter("scale") == Parameter("scale", "positional", "1.0")
    assert attend.returns == {2}
    assert [one.name for one in function(sources, "kern:Wrapper").parameters] == ["workspace", "layout"]
    assert [one.name for one in function(sources, "kern:Wrapper.free").parameters] == ["x"]
    assert function(sources, "kern:Lists").parameters == (
        Parameter("counts", "positional"),
        Parameter("size", "positional", "None"),
    )
    assert function(sources, "kern.core:Wrapper.run").returns == {1, 2}
    assert isinstance(sources.find("kern:flag"), Thing)
    assert isinstance(sources.find("kern:far"), Thing)
    assert sources.find("kern:missing") is None
    assert sources.find("nothing:missing") is None


def test_a_tree_may_have_the_package_further_down() -> None:
    below = Sources(index.Memory({f"hopper/{name}": text for name, text in FILES.items()}))
    assert function(below, "kern:attention").returns == {2}


def test_schemas_of_torch_are_read(sources: Sources) -> None:
    operator = function(sources, "torch:_op")
    assert operator.parameters == (
        Parameter("query", "positional"),
        Parameter("mask", "positional", "None"),
        Parameter("window", "positional", "[-1, 1]"),
        Parameter("scale", "keyword", "None"),
    )
    assert operator.returns == {2}


USE = uses.Use("kern", "kern:attend", order=("q|query", "k", "v"), asked=("lse",), returns=(1,))
CALL = uses.Call(3, frozenset({"scale"}), True)


def states(source: str, use: uses.Use = USE, call: uses.Call | None = CALL) -> dict[str, str]:
    found = Sources(index.Memory({"kern.py": source})).find("kern:attend")
    return {row.item: row.state for row in compare.use_rows(use, call, "1", found)}


@pytest.mark.parametrize(
    ("source", "item", "state"),
    [
        ("def attend(query, k, v, scale=1, lse=False) -> Tensor: ...", "argument 1", SAME),
        ("def attend(query, k, v, scale=1, lse=False) -> Tensor: ...", "lse", SAME),
        ("def attend(query, k, v, scale=1, lse=False) -> Tensor: ...", "returns", SAME),
        ("def attend(q, v, k, scale=1) -> Tensor: ...", "argument 2", DIFFERENT),
        ("def attend(q, k) -> Tensor: ...", "argument 3", DIFFERENT),
        ("def attend(q, k, v, sm_scale=1) -> Tensor: ...", "scale", DIFFERENT),
        ("def attend(q, k, v, **others) -> Tensor: ...", "scale", DIFFERENT),
        ("def attend(q, k, v, layout, scale=1) -> Tensor: ...", "layout", DIFFERENT),
        ("def attend(q, k, v, scale=1) -> tuple[Tensor, Tensor]: ...", "returns", DIFFERENT),
        ("def attend(q, k, v, scale=1): return compute(q)", "returns", UNREAD),
        ("def attend(q, k, v, scale=1): ...", "lse", ABSENT),
        ("attend = load('attend')", "scale", UNREAD),
        ("", "name", DIFFERENT),
    ],
)
def test_a_use_is_compared(source: str, item: str, state: str) -> None:
    assert states(source)[item] == state


def test_a_renamed_field_of_a_named_tuple_is_seen() -> None:
    renamed = compare.renamed_parameter(FILES["kern/core.py"], "kern.core:Lists", "size")
    found = function(Sources(index.Memory({"kern.py": renamed})), "kern:Lists")
    assert [one.name for one in found.parameters] == ["counts", "size_renamed"]


def test_what_no_release_has_is_a_difference() -> None:
    row = Row("kern", "1", "kern:attend", "lse", "", "", ABSENT, asked=True)
    assert [one.state for one in compare.never_there([row])] == [DIFFERENT]
    assert [one.state for one in compare.never_there([row, row._replace(version="2", state=SAME)])] == [ABSENT, SAME]


def test_every_line_of_the_table_finds_its_calls() -> None:
    calls = {use: uses.call_of(use) for use in uses.USES if use.at}
    assert [use.at for use, call in calls.items() if call is None] == []
    assert [use.at for use, call in calls.items() if call and call.starred and not (use.also or use.asked)] == []


def test_a_kernel_without_a_line_is_compared_by_name_and_its_calls_are_listed() -> None:
    *table, new = uses.all_uses([("kern", "kern:attend", ">=2"), ("flash-attn", "flash_attn:flash_attn_func", "")])
    assert (table, new.package, new.when) == ([*uses.USES], "kern", ">=2")
    assert states("def attend(q): ...", new, None) == {"name": SAME, "calls": UNREAD}


def test_a_fake_that_is_called_as_its_module_is_compared() -> None:
    assert uses.all_fakes([("a", "hub"), ("b", "arithmetic"), ("c", "nothing")])[len(uses.FAKE_MODULES) :] == [
        uses.Fake("arithmetic", "b", "arithmetic")
    ]


FAKE_FUNCTIONS = [
    pytest.param(fake, here, id=f"{fake.file}.{here}")
    for fake in uses.FAKE_MODULES
    for here, _, _ in uses.fake_functions(fake, (uses.FAKES / f"{fake.file}.py").read_text(encoding="utf-8"))
]


@pytest.mark.parametrize(("fake", "here"), FAKE_FUNCTIONS)
def test_a_renamed_parameter_is_seen_in_the_fake_and_in_the_package(fake: uses.Fake, here: str) -> None:
    source = (uses.FAKES / f"{fake.file}.py").read_text(encoding="utf-8")
    real = compare.declared_in(source, here)
    assert not [row for row in compare.fake_rows(fake, here, here, "1", real, real) if row.state != SAME]
    for one in real.parameters:
        if one.kind in ("positional", "keyword"):
            changed = compare.declared_in(compare.renamed_parameter(source, here, one.name), here)
            for declared, found in ((changed, real), (real, changed)):
                rows = compare.fake_rows(fake, here, here, "1", declared, found)
                place = real.parameters.index(one)
                missing = {(declared.parameters[place].name, "no such parameter")}
                if one.default is None:
                    missing.add((found.parameters[place].name, "has no default"))
                assert {(row.item, row.there) for row in rows if row.state == DIFFERENT} == missing


def test_a_fake_is_compared_with_the_release_that_is_nearest_among_those_that_can_be_read() -> None:
    row = Row("kern", "1", "kern:attend", "scale", "", "", UNREAD)
    far, near = [row._replace(state=DIFFERENT)] * 2, [row._replace(state=DIFFERENT), row._replace(state=SAME)]
    assert compare.nearest_release([[row], far, near]) == near
    assert compare.nearest_release([[row]]) == [row]


def test_every_fake_of_a_package_is_compared() -> None:
    inner = {"__init__", "arithmetic", "torch_operators"}  # the last one calls the real operators itself
    declared = [(package.distribution, package.module) for backend in DECLARED for package in backend.packages]
    compared = {fake.file for fake in uses.all_fakes(declared)}
    assert {path.stem for path in uses.FAKES.glob("*.py")} - inner == compared


class Index(index.Web):
    """A package index in memory."""

    def __init__(self, files: dict[str, bytes], content_type: str = index.JSON) -> None:
        super().__init__(1_000_000)
        self.files, self.content_type = files, content_type
        self.asked: list[str] = []

    def get(self, url: str, **headers: str) -> tuple[bytes, dict[str, str]]:
        body, span = self.files[url], headers.get("Range", "").removeprefix("bytes=")
        self.asked.append(span)
        if span.startswith("-"):
            part = body[-int(span[1:]) :]
        elif span:
            first, last = map(int, span.split("-"))
            part = body[first : last + 1]
        else:
            part = body
        return part, {"content-type": self.content_type, "content-range": f"bytes 0-1/{len(body)}"}


def test_files_of_a_wheel_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "BLOCK", 256)
    noise = {f"kern/part_{number}.so": f"{number} " * 4000 for number in range(20)}
    made = wheel({**noise, **FILES})
    web = Index({"u": made})
    tree = index.Zipped(index.Ranged(web, "u"))
    assert tree.read("kern/_api.py") == FILES["kern/_api.py"]
    assert 0 < len(web.asked) < 8


NAMES = ("kern-1.0-py3-none-any.whl", "kern-1.0.tar.gz", "kern-2.0.tar.gz", "kern-2.1rc1-py3-none-any.whl", "kern.txt")


def test_releases_are_listed_from_either_form_of_an_index() -> None:
    listed = [{"filename": name, "url": f"https://files/{name}"} for name in NAMES]
    listed.append({"filename": "kern-3.0.tar.gz", "url": "https://files/x", "yanked": True})  # type: ignore[dict-item]
    as_json = Index({"i/kern/": json.dumps({"files": listed}).encode()})
    links = "".join(f'<a href="{one["url"]}#sha256=0">{one["filename"]}</a>\n' for one in listed[:-1])
    as_html = Index({"i/kern/": (links + '<a data-yanked="" href="x">kern-3.0.tar.gz</a>').encode()}, "text/html")
    for web in (as_json, as_html):
        found = index.releases(web, "i", "kern")
        assert [(str(one.version), one.in_place) for one in found] == [("1.0", True), ("2.0", False), ("2.1rc1", True)]
        assert [str(one.version) for one in index.accepted(found, ">=1")] == ["1.0", "2.0"]
        assert [str(one.version) for one in index.accepted(found, ">2")] == ["2.1rc1"]


def test_the_index_is_the_one_that_pip_is_set_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "https://example.org/simple/")
    assert index.index_url() == "https://example.org/simple"
    monkeypatch.delenv("PIP_INDEX_URL")

    class Told:
        stdout = "global.index-url='https://example.net/simple'\ninstall.no-deps='true'\n"

    monkeypatch.setattr(index.subprocess, "run", lambda *args, **kwargs: Told)
    assert index.index_url() == "https://example.net/simple"
    Told.stdout = ""
    assert index.index_url() == index.DEFAULT_INDEX


def test_nothing_is_read_beyond_the_limit() -> None:
    with pytest.raises(index.TooMuchError):
        index.Web(0).get("https://example.org")


def test_a_persons_source_trees_are_found(tmp_path: Path) -> None:
    (tmp_path / "kern@2.0" / "src" / "kern").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "kern@2.0" / "src" / "kern" / "__init__.py").write_text("def attend(q): ...")
    (release,) = index.source_trees(tmp_path)
    assert (release.package, release.version) == ("kern", Version("2.0"))
    assert function(Sources(release.open()), "kern:attend").parameters == (Parameter("q", "positional"),)


def releases_of(texts: dict[str, str]) -> list[index.Release]:
    return [
        index.Release("kern", Version(version), lambda text=text: index.Memory({"kern.py": text}), True)  # type: ignore[misc]
        for version, text in texts.items()
    ]


def test_the_release_that_changed_something_is_found() -> None:
    texts = {str(number): f"def attend(q{', scale=1' if number > 4 else ''}): ..." for number in range(1, 10)}
    found = releases_of(texts)

    def sources_of(release: index.Release) -> Sources:
        return Sources(release.open())

    def has(release: index.Release) -> bool:
        return function(sources_of(release), "kern:attend").parameter("scale") is not None

    assert compare.since(found, has) == "5"
    for version, state in (("5", {SAME}), ("4", {SAME, DIFFERENT}), ("6", {DIFFERENT, SAME})):
        rows = compare.gate_rows(uses.Gate("kern", version, "kern:attend", "scale"), found, sources_of)
        assert {row.state for row in rows} == state


def test_names_and_keys_of_a_system_are_compared() -> None:
    files = {
        "sys/names.py": "class Names(Enum):\n    FLASH = 'flash'\n    NEW = 'new'\n",
        "sys/data.py": "class Spec:\n    backend: str\n    topk: int = 1\n    inner: int = field(repr=False)\n",
    }
    system = systems.System("sys", "sys/names.py", "Names", keys=("Spec",), keys_in="sys/data.py")
    ours = {"FLASH": "flash_attn"}
    rows = systems.system_rows(
        system, "1", index.Memory(files), lambda name: ours.get(name, ""), ["FLASH", "OLD"], ["backend"]
    )
    assert {(row.item, row.state) for row in rows} == {
        ("FLASH", SAME),
        ("NEW", DIFFERENT),
        ("OLD", ABSENT),
        ("key Spec.backend", SAME),
        ("key Spec.topk", DIFFERENT),
    }
    asking = {"sys/run.py": "cfg = args.attention_backend_config\ncfg.get('topk', 1)\ncfg['tau']\nx['not']\n"}
    assert systems.asked_keys(index.Memory(asking), "sys/") == ["topk", "tau"]


def test_the_page_has_a_row_for_each_difference() -> None:
    row = Row("kern", "1", "kern:attend", "scale", "is passed", "no such parameter", DIFFERENT)
    empty: dict[str, Any] = dict.fromkeys(("fakes", "gates", "pins", "systems", "renamed"), ())
    uses_rows = [
        row,
        row._replace(version="2"),
        row._replace(item="q", state=SAME),
        row._replace(item="x", state=UNREAD),
        *(row._replace(item="y", state=state) for state in (SAME, UNREAD)),
    ]
    outcome = page.Outcome("2026-01-01", 0, {"kern": ["1", "2"]}, {"far": "no"}, uses_rows, **empty)
    text = page.page_of(outcome)
    assert [line.split("|")[1:5] for line in text.splitlines() if line.startswith("| kern | 1, 2 | `")] == [
        [" kern ", " 1, 2 ", " `kern:attend` ", " scale "]
    ]
    assert page.parameters(uses_rows) == {DIFFERENT: 1, SAME: 1, UNREAD: 1, page.IN_SOME: 1}
    assert len(page.differences(outcome)) == 2
    assert "tell: 2 rows.\n" in text, "x and y in release 1 are shown"
    assert page.NO_DIFFERENCES["Systems"] not in text, "no row is shown there"
    absent = page.page_of(outcome._replace(systems=[row._replace(state=ABSENT)] * 2))
    assert f"publish: 2 rows. {page.NO_DIFFERENCES['Systems']}\n" in absent
    listed = [line for line in text.splitlines() if "no kernel uses it" in line]
    assert [line.split("|")[1].strip() for line in listed] == [*uses.WITHOUT_KERNEL]


def test_what_is_said_to_have_no_kernel_has_none() -> None:
    declared = {package.distribution for backend in DECLARED for package in backend.packages}
    assert not {*uses.WITHOUT_KERNEL} & {*declared, *(use.package for use in uses.USES)}
