"""The demo: the shipped model and adapters on embedded defaults, in a directory that is gone afterwards."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from loraplex.config.demo import ADAPTERS_DIR, EXAMPLE_PROMPTS, MODEL_DIR, adapter_names
from loraplex.config.settings import (
    Adapters,
    Auth,
    Database,
    EngineSettings,
    FileSettings,
    Model,
    Server,
    Settings,
    UsageSettings,
    environment,
)

if TYPE_CHECKING:
    from loraplex.gateway.services import Services

BASE_NAME = "loraplex-demo"


class DemoAccess(msgspec.Struct, frozen=True):
    """What a user needs to talk to the demo; `models` are the base, then the adapters."""

    base_url: str
    api_key: str
    admin_key: str
    models: list[str]


@contextmanager
def demo_settings(host: str, port: int) -> Iterator[Settings]:
    """Settings on a fresh temporary directory."""
    with tempfile.TemporaryDirectory(prefix="loraplex-demo-") as directory:
        home = Path(directory)
        yield Settings(
            model=Model(path=str(MODEL_DIR), name=BASE_NAME, dtype="float32"),
            server=Server(host=host, port=port, drain_seconds=5),
            engine=EngineSettings(kv_cache_bytes=256 * 2**20),
            adapters=Adapters(
                cache_dir=str(home / "adapters"),
                local_roots=(str(ADAPTERS_DIR), str(Path.cwd())),
                device_bytes=128 * 2**20,
            ),
            database=Database(url=f"sqlite+aiosqlite:///{home / 'loraplex.db'}"),
            auth=Auth(pepper_file=str(home / "pepper")),
            files=FileSettings(directory=str(home / "files")),
            usage=UsageSettings(prompt_log=str(home / "prompts.jsonl")),
        )


async def furnish(settings: Settings, services: Services, base_url: str) -> DemoAccess:
    """Register the shipped adapters, make a tenant with a key, warm every adapter."""
    admin_key = services.new_admin_key or environment(settings.auth.admin_key_env)
    tenant = await services.tenants.create_tenant("demo")
    key = await services.tenants.create_key(tenant.id, "demo")
    for name in adapter_names():
        entry = await services.catalogue.register(name, str(ADAPTERS_DIR / name))
        await services.catalogue.warm(entry.key)
    assert key.key is not None, "a new key is shown"
    assert admin_key is not None, "it is new, or the environment has it"
    return DemoAccess(base_url, key.key, admin_key, [BASE_NAME, *adapter_names()])


def greeting(access: DemoAccess) -> str:
    """Ready-to-paste ways to talk to the demo."""
    model, prompt = access.models[1], EXAMPLE_PROMPTS[0]
    body = {"model": model, "stream": True, "messages": [{"role": "user", "content": prompt}]}
    return f"""
The demo is ready. One base model and {len(access.models) - 1} LoRA adapters, batched in one forward pass:

  {", ".join(access.models)}

  base_url   {access.base_url}
  api_key    {access.api_key}
  admin_key  {access.admin_key}

With curl:

curl -N {access.base_url}/chat/completions \\
  -H "Authorization: Bearer {access.api_key}" -H "Content-Type: application/json" \\
  -d '{msgspec.json.encode(body).decode()}'

With the OpenAI SDK:

from openai import OpenAI
client = OpenAI(base_url="{access.base_url}", api_key="{access.api_key}")
for chunk in client.chat.completions.create(
    model="{model}", stream=True, messages=[{{"role": "user", "content": "{prompt}"}}]
):
    print(chunk.choices[0].delta.content or "", end="", flush=True)

Ctrl-C stops it.
"""
