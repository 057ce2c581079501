"""The way back from a configuration to text, and text from anywhere: places of errors, bounds, closed files."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
from attention_backends.backends.config import AttentionConfig, AttentionSpec
from attention_backends.backends.config import print as printed
from attention_backends.backends.config.names import BACKEND_IDS
from attention_backends.backends.config.print import to_dict, to_flags, to_json, to_yaml
from attention_backends.backends.config.text import parse_config
from attention_backends.backends.kernels import BACKENDS
from attention_backends.backends.values.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st
from option_backend import WithOptions
from syrupy.assertion import SnapshotAssertion


def backends(default: str | None = None, **per_role: str) -> dict[str, Any]:
    found: dict[str, Any] = {"default": {"backend": default}} if default else {}
    if per_role:
        found["per_role"] = {role: {"backend": backend} for role, backend in per_role.items()}
    return found


# Places of errors, and text from anywhere


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{\n "default": "sage",\n "per_role": {"cross": }\n}', "line 3, column 24"),
        ("default: sage\nper_role:\n  cross: [a\nx", "line "),
        ("default: sage\nper_role:\n  cross: sagee\n", "per_role['cross']"),
        ("default: sage\nbackends: x\n", "unknown entry backends"),
        ('{\n "default": "sage",\n "per_role": {"cross": "sagee"}\n}', "per_role['cross']"),
        ("backend=sage\nper_role.cross=sagee\n", "per_role['cross']"),
        ("backend=sage\nstrict\n", "'strict' is not name=value"),
        ("default: sage\ndefault: fa\n", "line 2, column 1"),
    ],
)
def test_errors_point_at_the_place(text: str, place: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_config(text)
    assert place in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        '{"default": "fa", "default": "sage"}',
        '{"default": NaN}',
        pytest.param('{"a":' * 100_000, id="deep"),
        "a: &a [*a]",
        pytest.param(
            "a: &a [x,x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]"
            "\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d]",
            id="an anchor in each line",
        ),
        "per_role: {1: fa}",
        "per_role: {a.b: fa, a: {b: fa}}",
        "a: 2001-13-01",
    ],
)  # fmt: skip
def test_text_from_anywhere_is_refused_in_bounds(text: str, snapshot: SnapshotAssertion) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    assert str(caught.value) == snapshot


@pytest.mark.parametrize(
    "text",
    [
        "FILE",
        "--attention-backend fa --attention-backend-config FILE",
        "--component-attention-backends FILE",
        "transformer=FILE",
        "ATTENTION_BACKENDS_CONFIG=FILE",
        "attention_backend: fa\nattention_backend_config: FILE",
    ],
)
def test_files_stay_closed_where_the_text_is_not_trusted(
    text: str, tmp_path: Path, snapshot: SnapshotAssertion
) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text('{"sesame": 1}')
    with pytest.raises(ValueError, match=r".") as caught:
        parse_config(text.replace("FILE", str(secret)), read_files=False)
    if not text.startswith("transformer"):
        assert str(caught.value).replace(str(secret), "FILE") == snapshot
    assert "sesame" not in str(caught.value)


@given(st.text(alphabet=string.printable, max_size=60))
@settings(max_examples=300, deadline=None)
def test_no_text_ends_in_another_error(text: str) -> None:
    try:
        config = parse_config(text, read_files=False)
    except ValueError:
        return
    assert parse_config(to_json(config), config.source) == config


# The way back


@pytest.fixture
def tunable(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(BACKENDS, WithOptions.id, WithOptions())
    return WithOptions.id


NAMES = st.sampled_from(
    ["self", "cross", "joint", "ltx2", "ltx2.audio_self", "a b", "x'y", 'x"y', "extra", "a.backend"]
)
ODD = ["1e-3", "true", "off", "a=b", "a,b", "'x'", '"x"', "[1]", "", " ", "#x", "-1", "a: b", "\\", "{", "\x85", "0x1"]
VALUES = st.fixed_dictionaries(
    {},
    optional={
        "share": st.floats(0, 1),
        "steps": st.integers(-5, 5),
        "name": st.one_of(
            st.sampled_from(ODD),
            st.text(max_size=8),
        ),
        "sizes": st.lists(st.integers(0, 9), max_size=3),
        "fast": st.booleans(),
        "more": st.dictionaries(st.text(min_size=1, max_size=3), st.integers() | st.text(max_size=3), max_size=2),
    },
)  # fmt: skip
PLAIN = st.sampled_from([name for name in BACKEND_IDS if name != "sdpa_math"]).map(lambda name: (name, {}))
SPECS = st.one_of(PLAIN, VALUES.map(lambda extra: ("sdpa_math", extra)), st.just(("auto", {})))
CONFIGS = st.fixed_dictionaries(
    {"default": SPECS, "per_role": st.dictionaries(NAMES, SPECS, max_size=4)},
    optional={
        "accuracy": st.sampled_from(["exact", "quantized", "sparse"]),
        "strict": st.booleans(),
        "guard": st.sampled_from(["off", "watch", "enforce"]),
    },
)


def built(parts: dict[str, Any]) -> AttentionConfig:
    roles = {role: AttentionSpec(*spec) for role, spec in parts["per_role"].items()}
    return AttentionConfig(**{**parts, "default": AttentionSpec(*parts["default"]), "per_role": roles})


@pytest.mark.parametrize("form", ["dict", "json", "yaml", "flags"])
def test_what_is_printed_reads_to_the_same(form: str, tunable: str) -> None:
    @given(CONFIGS)
    @settings(max_examples=150, deadline=None)
    def check(parts: dict[str, Any]) -> None:
        config = built(parts)
        text = getattr(printed, f"to_{form}")(config)
        assert parse_config(text) == config, text

    check()


def test_printed_forms_are_short() -> None:
    config = parse_config({"backend": "sage", "per_role": {"cross": "sdpa", "ltx2.audio_self": "auto"}, "strict": True})
    assert to_dict(config) == {**backends("sage_attn", cross="torch_sdpa"), "strict": True}
    assert to_flags(config) == "default.backend=sage_attn per_role.cross.backend=torch_sdpa strict=true"
    assert to_yaml(config).startswith("default:\n  backend: sage_attn\n")
    nested = parse_config({"per_role": {"ltx2": "sage", "ltx2.audio_self": "sdpa"}})
    assert to_flags(nested).startswith("per_role='{"), "a dotted name would put one into the other"
    assert parse_config(to_flags(nested)) == nested
    assert to_dict(AttentionConfig()) == {}
    assert to_flags(AttentionConfig()) == ""
