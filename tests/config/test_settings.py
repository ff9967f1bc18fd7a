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


def test_container_may_write_where_the_example_says() -> None:
    settings = load_settings(ROOT / "config" / "example.toml")
    image = (ROOT / "Dockerfile").read_text()
    written = [
        settings.database.url.removeprefix("sqlite:///"), settings.auth.pepper_file, settings.adapters.cache_dir,
        settings.files.directory, settings.usage.prompt_log,
    ]  # fmt: skip
    home = "/var/lib/loraplex"
    assert f"install -d -o loraplex -g loraplex -m 700 {home}" in image
    assert f"VOLUME {home}\nWORKDIR {home}\n" in image  # and where paths without a directory lead
    assert [path for path in written if not path.startswith(f"{home}/")] == []


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
        (MODEL + 'device = "gpu"', "$.model.device"),
        (MODEL + 'device = "cuda:"', "$.model.device"),
        (MODEL + "[upstream]\nurl = 'http://h:1'", "engine.kind = 'upstream', not 'native'"),
        (MODEL + "[engine]\nkind = 'upstream'\n[upstream]\nurl = 'http://h:1/v1'", "without user, query and /v1"),
        (MODEL + "[engine]\nkind = 'upstream'\n[upstream]\nurl = 'http://u:p@h'", "without user, query and /v1"),
        (MODEL + "[model", "loraplex.toml"),
        (MODEL + "[server]\ncors_origins = ['https://app.example.com/']", "without a path"),
        (MODEL + "[server]\ncors_origins = ['app.example.com']", "https://app.example.com, not 'app.example.com'"),
        (MODEL + "[server]\ncors_origins = ['https://App.example.com']", "small letters"),
        (MODEL + "[server]\ncors_origins = '*'", "$.server.cors_origins"),
        (MODEL + "[server]\ntrusted_proxies = ['127.0.0.1/33']", "networks or `*`, not '127.0.0.1/33'"),
        (MODEL + "[server]\ntrusted_proxies = ['proxy']", "networks or `*`, not 'proxy'"),
        (MODEL + "[adapters]\ns3_endpoint = 'zzz'", "`s3_endpoint` is an address"),
        (MODEL + "[adapters]\nhub_endpoint = 'ftp://hub'", "`hub_endpoint` is an address"),
        (MODEL + 'dtype = "int4"', "auto, bfloat16, float16, float32"),
        (MODEL + 'quantization = "int4"', "int8, none"),
        (MODEL + 'quantization = "int8"\ndevice = "cuda:1"', "`quantization` is for a CPU"),
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
