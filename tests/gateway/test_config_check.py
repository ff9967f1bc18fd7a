"""What check-config finds without loading the model or reaching anything."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from support.gateway import settings_in
from support.upstream import built, in_front_of, write_echo_base

from loraplex.config.settings import Adapters, Database, EngineSettings, LimitSettings, Model, Settings
from loraplex.config.upstream import UpstreamSettings
from loraplex.gateway.config_check import faults


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.delenv("LORAPLEX_TEST_ADMIN_KEY", raising=False)
    return settings_in(tmp_path)


def test_faults_of_settings_that_work_are_none(settings: Settings) -> None:
    assert list(faults(settings)) == []


CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown engine": ({"engine": EngineSettings(kind="warp")}, ["engine.kind = 'warp'"]),
    "another database": ({"database": Database(url="mysql://host/db")}, ["database.url: loraplex keeps its tables in"]),
    "no database's url": ({"database": Database(url="nonsense")}, ["database.url: "]),
    "driver that waits": ({"database": Database(url="postgresql+psycopg2://h/l")}, ["database.url: "]),
    "no redis's url": ({"limits": LimitSettings(redis_url="localhost:6379")}, ["limits.redis_url: "]),
    "no redis's port": ({"limits": LimitSettings(redis_url="redis://h:port")}, ["limits.redis_url: "]),
    "no certificates": ({"adapters": Adapters(https_ca_file="/nowhere.pem")}, ["adapters.https_ca_file: "]),
    "two at once": (
        {"database": Database(url="nonsense"), "limits": LimitSettings(redis_url="localhost")},
        ["database.url: ", "limits.redis_url: "],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_faults_name_the_settings(settings: Settings, case: str) -> None:
    changes, says = CASES[case]
    found = list(faults(replace(settings, **changes)))
    assert [fault[: len(start)] for fault, start in zip(found, says, strict=True)] == says, found


def test_faults_tell_of_a_driver_that_is_not_installed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    (fault,) = faults(replace(settings, database=Database(url="postgresql://h/l")))
    assert fault == "database.url: PostgreSQL's driver is not installed: pip install 'loraplex[postgres]'"


def test_faults_tell_of_a_model_that_is_not_there_and_of_one_without_tokenizer(
    settings: Settings, tmp_path: Path
) -> None:
    model = Model(path=str(tmp_path / "model"), name="m")
    settings = replace(settings, model=model, engine=EngineSettings())
    (fault,) = faults(settings)
    assert fault == f"model.path = {model.path!r} holds no config.json"
    model.directory.mkdir()
    (model.directory / "config.json").write_text("{}")
    (fault,) = faults(settings)
    assert "holds no tokenizer.json" in fault
    assert list(faults(replace(settings, model=replace(model, random_weights=True)))) == []
    (model.directory / "tokenizer.model").touch()
    assert list(faults(settings)) == []


UPSTREAM = EngineSettings(kind="upstream")
UPSTREAMS: dict[str, tuple[dict[str, Any], str | None]] = {
    "whole": ({}, None),
    "no address": ({"upstream": UpstreamSettings()}, "upstream.url is to say which server computes"),
    "no certificates": (
        {"upstream": UpstreamSettings(url="https://h", ca_file="/nowhere.pem")}, "upstream.ca_file: /nowhere.pem holds"
    ),
    "of an engine's own": (
        {"engine": replace(UPSTREAM, kv_block_size=8)}, "engine.kv_block_size has no effect with engine.kind = 'upstr"
    ),
    "of its device": ({"adapters": Adapters(device_share=0.5)}, "adapters.device_share has no effect"),
    "no model": ({"model": Model(path="/nowhere", name="m")}, "model.path = '/nowhere' holds no config.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", UPSTREAMS)
def test_faults_of_an_upstream_name_the_settings(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr("loraplex.gateway.config_check.build_engine", built)
    there = in_front_of("http://h:1", tmp_path, write_echo_base(tmp_path / "base"), "m")
    changes, says = UPSTREAMS[case]
    found = list(faults(replace(there, **changes)))
    assert len(found) == (says is not None), found
    assert says is None or found[0].startswith(says)


POSITIONS: dict[str, tuple[str, str | None]] = {
    "as many": ('{"max_position_embeddings": 64}', None),
    "fewer": ('{"max_position_embeddings": 63}', "model.max_model_len = 64 exceeds the checkpoint's 63 positions"),
    "of its text": (
        '{"max_position_embeddings": 64, "text_config": {"max_position_embeddings": 7}}',
        "model.max_model_len = 64 exceeds the checkpoint's 7 positions",
    ),
    "left to the kind of model": ('{"max_position_embeddings": null}', None),
    "no JSON": ("{", "config.json cannot be read: "),
    "no object": ("[]", "config.json describes no model"),
}


@pytest.mark.parametrize("case", POSITIONS)
def test_faults_tell_of_more_tokens_than_the_checkpoint_has_positions(
    settings: Settings, tmp_path: Path, case: str
) -> None:
    config, says = POSITIONS[case]
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "tokenizer.model").touch()
    model = Model(path=str(tmp_path), name="m", max_model_len=64)
    found = list(faults(replace(settings, model=model, engine=EngineSettings())))
    assert len(found) == (says is not None)
    assert says is None or says in found[0]


@pytest.mark.parametrize("key", ["k", "x" * 19])
def test_faults_tell_of_an_admin_key_that_could_be_guessed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("LORAPLEX_TEST_ADMIN_KEY", key)
    (fault,) = faults(settings)
    assert fault.startswith("LORAPLEX_TEST_ADMIN_KEY is too short: an admin key has 20 characters or more")
    monkeypatch.setenv("LORAPLEX_TEST_ADMIN_KEY", "x" * 20)
    assert list(faults(settings)) == []
