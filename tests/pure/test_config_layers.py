"""Settings and the environment: what one configuration leaves unsaid, the next one says."""

from __future__ import annotations

import logging

import pytest
from attention_backends.backends.config import names
from attention_backends.backends.config import text as config_text
from attention_backends.backends.config.layers import resolve, settings_of
from attention_backends.backends.config.names import UnknownBackendError
from attention_backends.backends.config.text import from_environment, parse_config
from attention_backends.backends.values.errors import ConfigError
from syrupy.assertion import SnapshotAssertion


def test_a_setting_that_is_not_said_comes_from_the_next_configuration() -> None:
    layers = (parse_config("fa"), parse_config("guard=watch"), parse_config("strict=true guard=off accuracy=sparse"))
    assert settings_of(layers) == ("sparse", True, "watch")
    assert settings_of((parse_config("strict=false"), *layers)).strict is False
    assert settings_of(()) == ("exact", False, "watch")


def test_a_malformed_variable_matters_only_where_it_could_decide(
    caplog: pytest.LogCaptureFixture, snapshot: SnapshotAssertion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "NAMES", (names.AUTO, names.AUTOTUNE, *names.MENU))  # a new kernel is not in the text
    config_text._warn_once.cache_clear()
    broken = {"DIFFUSION_ATTENTION_BACKEND": "no such thing"}
    with pytest.raises(UnknownBackendError, match="DIFFUSION_ATTENTION_BACKEND: unknown"):
        from_environment(broken, above=(parse_config("per_role.self=sdpa_math"),))
    with caplog.at_level(logging.WARNING, "attention_backends"):
        assert from_environment(broken, above=(parse_config("torch_sdpa"),)) == ()
    assert caplog.messages == snapshot
    above = {**broken, "ATTENTION_BACKENDS_CONFIG": "sage"}
    assert [layer.source for layer in from_environment(above)] == ["ATTENTION_BACKENDS_CONFIG"]
    with pytest.raises(ConfigError, match=r"ATTENTION_BACKENDS_CONFIG\.default: expected"):
        from_environment({"ATTENTION_BACKENDS_CONFIG": '{"default": 3}'})


def test_the_environment_says_what_a_name_means_here(snapshot: SnapshotAssertion) -> None:
    (layer,) = from_environment({"DIFFUSERS_ATTN_BACKEND": "_flash_3_hub"})
    assert resolve((layer,), "self", "self").asked == "flash_attn_3"
    assert layer.notes == snapshot
