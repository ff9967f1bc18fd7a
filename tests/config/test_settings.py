"""The settings file: the example works, mistakes are named, and the reference says what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraplex.config.reference import settings_markdown
from loraplex.config.settings import SettingsError, load_settings

ROOT = Path(__file__).parent.parent.parent
MODEL = '[model]\npath = "x"\nname = "y"\n'


def test_example_is_valid() -> None:
    settings = load_settings(ROOT / "config" / "example.toml")
    assert settings.model.name == "tinyllama"
    assert settings.server.drain_seconds == 30


def test_reference_is_what_the_settings_say() -> None:
    assert (ROOT / "docs" / "settings.md").read_text() == settings_markdown()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "model"),
        ("[model]\nname = 'y'", "path"),
        (MODEL + "[server]\nprot = 1", "prot"),
        (MODEL + "[server]\nport = 70000", "$.server.port"),
        (MODEL + "[engine]\nkv_cache_bytes = 0", "$.engine.kv_cache_bytes"),
        (MODEL + "[adapters]\ndevice_bytes = 1048576\ndevice_share = 0.5", "`device_bytes` and `device_share`"),
        (MODEL + "[adapters]\ndevice_bytes = 1048575", "$.adapters.device_bytes"),
        (MODEL + "[adapters]\ndevice_share = 1.0", "$.adapters.device_share"),
        (MODEL + "[adapters]\npreload = [1]", "$.adapters.preload"),
        (MODEL + "[model", "loraplex.toml"),
        (MODEL + "[server]\ncors_origins = ['https://app.example.com/']", "without a path"),
        (MODEL + "[server]\ncors_origins = ['app.example.com']", "https://app.example.com, not 'app.example.com'"),
        (MODEL + "[server]\ncors_origins = ['https://App.example.com']", "small letters"),
        (MODEL + "[server]\ncors_origins = '*'", "$.server.cors_origins"),
    ],
)
def test_load_settings_mistake_is_named_with_the_file(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "loraplex.toml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_settings(path)
    assert says in str(caught.value)
    assert "loraplex.toml" in str(caught.value)


def test_load_settings_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.toml"):
        load_settings(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("text", "room"),
    [("", 2**30), ("[adapters]\ndevice_bytes = 3145728", 3 * 2**20), ("[adapters]\ndevice_share = 0.25", 2**32 // 4)],
    ids=["neither", "bytes", "share"],
)
def test_room_for_adapters_is_said_in_bytes_or_as_a_share(tmp_path: Path, text: str, room: int) -> None:
    path = tmp_path / "loraplex.toml"
    path.write_text(MODEL + text)
    assert load_settings(path).adapters.device_room(free=2**32) == room
