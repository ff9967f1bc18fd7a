"""An adapter that ships a template, added tokens and an end of its own, asked for through the unmodified SDK."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from openai import OpenAI
from support.gateway import Gateway, running, settings_in
from support.models import make_tokenizer
from support.worlds import SmallWorld
from transformers import AutoTokenizer

ADMIN_KEY = "an-admin-key-of-the-tests"
ASK: Any = [{"role": "user", "content": "a <tool> for Żółw"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}({{ m.role }}) {{ m.content }}<tool>{% endfor %}{{ mood }}"


@pytest.fixture(scope="module")
def gateway(small: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    home = tmp_path_factory.mktemp("gateway")
    world = small.settings(kv_cache_bytes=2**20)
    settings = msgspec.structs.replace(settings_in(home), model=world.model, engine=world.engine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAPLEX_TEST_ADMIN_KEY", ADMIN_KEY)
        with running(settings, ADMIN_KEY) as gateway:
            gateway.tenant_id, gateway.api_key = gateway.new_tenant("tests")
            gateway.adapter_dir = home / "local"
            yield gateway


def register(gateway: Gateway, small: SmallWorld, name: str, **files: str) -> httpx.Response:
    """Register a copy of an adapter with these files beside it; `__` stands for a dot."""
    directory = gateway.adapter_dir / name
    directory.mkdir(parents=True)
    for path in Path(small.adapters["rank-8"].path).glob("adapter_*"):
        (directory / path.name).write_bytes(path.read_bytes())
    for file, text in files.items():
        (directory / file.replace("__", ".")).write_text(text)
    with gateway.admin() as admin:
        return admin.post("/admin/v1/adapters", json={"name": name, "source": str(directory)})


def own_files(tmp_path: Path, **config: Any) -> dict[str, str]:
    """What transformers saves of a tokenizer with a token more and a template of its own."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**told, **config}))
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    return {name.replace(".", "__"): (tmp_path / name).read_text() for name in names}


def test_adapter_speaks_by_its_own_files_and_its_neighbours_by_the_bases(
    gateway: Gateway, small: SmallWorld, tmp_path: Path
) -> None:
    assert register(gateway, small, "plain").status_code == 201
    assert register(gateway, small, "own", **own_files(tmp_path)).status_code == 201
    oracle: Any = AutoTokenizer.from_pretrained(tmp_path)
    prompt = oracle.apply_chat_template(ASK, mood="calm", return_dict=False)
    assert 262 in prompt, "the added token"
    adapter = small.adapters["rank-8"]
    expected = small.oracle.greedy(prompt, 12, adapter)
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.api_key, max_retries=0) as client:
        options: dict[str, Any] = {"messages": ASK, "temperature": 0, "max_tokens": 12}
        extra = {"chat_template_kwargs": {"mood": "calm"}}
        answer = client.chat.completions.create(model="own", **options, extra_body=extra)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(prompt)
        assert answer.choices[0].message.content == oracle.decode(expected, skip_special_tokens=True)
        stream = client.chat.completions.create(model="own", **options, extra_body=extra, stream=True)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert streamed == answer.choices[0].message.content
        for model in ("small", "plain"):
            theirs: Any = AutoTokenizer.from_pretrained(small.directory)
            prompt = theirs.apply_chat_template(ASK, add_generation_prompt=True, return_dict=False)
            expected = small.oracle.greedy(prompt, 12, adapter if model == "plain" else None)
            answer = client.chat.completions.create(model=model, **options)
            assert answer.choices[0].message.content == theirs.decode(expected, skip_special_tokens=True)


def test_answer_ends_at_the_adapters_own_end(gateway: Gateway, small: SmallWorld, tmp_path: Path) -> None:
    prompt = list(range(40, 60))
    free = small.oracle.greedy(prompt, 12, small.adapters["rank-8"])
    base = make_tokenizer()
    place = next(place for place, token in enumerate(free) if place > 2 and token not in free[:place])
    end = base.convert_ids_to_tokens(free[place])
    files = own_files(tmp_path, eos_token=end)
    assert register(gateway, small, "ends", **files).status_code == 201
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.api_key, max_retries=0) as client:
        options: dict[str, Any] = {"model": "ends", "prompt": prompt, "temperature": 0, "max_tokens": 12}
        answer = client.completions.create(**options)
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == place + 1
        whole = client.completions.create(**options, extra_body={"ignore_eos": True})
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 12


def test_tokens_without_rows_are_refused_when_registering(gateway: Gateway, small: SmallWorld) -> None:
    answer = register(gateway, small, "padded", added_tokens__json='{"[PAD]": 320}')
    assert answer.status_code == 400
    assert "adds '[PAD]' as the token 320, for which the model has no row" in answer.json()["error"]["message"]
    with gateway.admin() as admin:
        assert "padded" not in {entry["name"] for entry in admin.get("/admin/v1/adapters").json()["data"]}


def test_tokenize_of_an_adapter_uses_its_tokenizer(gateway: Gateway, small: SmallWorld, tmp_path: Path) -> None:
    assert register(gateway, small, "tokens", **own_files(tmp_path)).status_code == 201
    with gateway.client() as client:
        own = client.post("/tokenize", json={"model": "tokens", "prompt": "x<tool>"}).json()
        assert own["tokens"][-1] == 262
        assert client.post("/detokenize", json={"model": "tokens", "tokens": [262]}).json() == {"prompt": "<tool>"}
        assert 262 not in client.post("/tokenize", json={"model": "small", "prompt": "x<tool>"}).json()["tokens"]
