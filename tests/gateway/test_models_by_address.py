"""`model` on OpenAI's routes: a name of the catalogue, an adapter that the request itself names, or the base."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from openai import NotFoundError, OpenAI, PermissionDeniedError
from support.batching import begin, jsonl, lines_of, request_line, text_of, wait
from support.gateway import BASE, Gateway, running, settings_in, write_adapter
from support.hub_server import FakeHub, serve_hub
from support.problems import assert_problem

ADMIN_KEY = "an-admin-key-of-the-tests"
SAID = "abc"
LOCAL, HUB, ADDRESS, PRIVATE = "local", "acme/tales", "hf://acme/tales", "acme/private"
TOKEN = "hf_0f_acme_alone"
UNKNOWN = ("nobody", "other/tales", "hf://other/tales", "acme", "a b", "ftp://x/y", "/etc", "acme//tales")


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with serve_hub() as served:
        yield served


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, hub: FakeHub) -> Iterator[Gateway]:
    """Its tenant may name adapters below `mine`, and those of acme on the hub."""
    home = tmp_path_factory.mktemp("addresses")
    mine = write_adapter(home / "local" / "mine" / "tales")
    files = {path.name: path.read_bytes() for path in mine.iterdir()}
    hub.repository(HUB, files)
    repository, _ = hub.repository(PRIVATE, {**files, "adapter_config.json": files["adapter_config.json"] + b" "})
    repository.token = TOKEN
    settings = settings_in(home)
    adapters = msgspec.structs.replace(settings.adapters, hub_endpoint=hub.url)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAPLEX_TEST_ADMIN_KEY", ADMIN_KEY)
        with running(msgspec.structs.replace(settings, adapters=adapters), ADMIN_KEY) as gateway:
            gateway.tenant_id, gateway.api_key = gateway.new_tenant("addresses")
            gateway.adapter_dir = home / "local" / "mine"
            with gateway.admin() as admin:
                limits = {"request_adapters": [f"file://{gateway.adapter_dir}/*", "hf://acme/*"]}
                assert admin.put(f"/admin/v1/tenants/{gateway.tenant_id}/limits", json=limits).status_code == 200
            yield gateway


@pytest.fixture
def openai(gateway: Gateway) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.api_key, max_retries=0) as client:
        yield client


def chat(client: OpenAI, model: str, **extra: Any) -> tuple[str, str | None]:
    answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": SAID}], extra_body=extra)
    return answer.model, answer.choices[0].message.content


def streamed(client: OpenAI, model: str, **extra: Any) -> tuple[str, str | None]:
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": SAID}], stream=True, extra_body=extra
    )
    chunks = list(stream)
    return chunks[0].model, "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def completion(client: OpenAI, model: str, **extra: Any) -> tuple[str, str | None]:
    answer = client.completions.create(model=model, prompt=SAID, max_tokens=200, extra_body=extra)
    return answer.model, answer.choices[0].text


def response(client: OpenAI, model: str, **extra: Any) -> tuple[str, str | None]:
    answer = client.responses.create(model=model, input=SAID, extra_body=extra)
    return answer.model, answer.output_text


TEXTS = [chat, streamed, completion, response]


def address_of(gateway: Gateway, model: str) -> str:
    return str(gateway.adapter_dir / "tales") if model == LOCAL else model


@pytest.mark.parametrize("model", [LOCAL, HUB, ADDRESS])
@pytest.mark.parametrize("ask", TEXTS, ids=lambda ask: ask.__name__)
def test_adapter_that_nobody_registered_answers(
    gateway: Gateway, openai: OpenAI, ask: Callable[..., Any], model: str
) -> None:
    name = address_of(gateway, model)
    told, text = ask(openai, name)
    assert told == name
    assert text in (f"{name}: {SAID}", f"{HUB}: {SAID}", f"{ADDRESS}: {SAID}")  # the hub's two ways of writing are one


@pytest.mark.parametrize("model", [LOCAL, HUB, ADDRESS])
def test_embedding_of_an_adapter_that_nobody_registered(gateway: Gateway, openai: OpenAI, model: str) -> None:
    name = address_of(gateway, model)
    found = openai.embeddings.create(model=name, input=SAID)
    assert found.model == name
    base = openai.embeddings.create(model=BASE, input=SAID)
    assert found.data[0].embedding != base.data[0].embedding


@pytest.mark.parametrize("source", ["local", "hub"])
@pytest.mark.parametrize("ask", TEXTS, ids=lambda ask: ask.__name__)
def test_request_says_where_the_adapter_is(
    gateway: Gateway, openai: OpenAI, ask: Callable[..., Any], source: str
) -> None:
    name = address_of(gateway, LOCAL if source == "local" else HUB)
    told, text = ask(openai, name, adapter_source=source)
    assert (told, (text or "").endswith(f"tales: {SAID}")) == (name, True)


@pytest.mark.parametrize("ask", [*TEXTS, "embedding"], ids=lambda ask: getattr(ask, "__name__", ask))
def test_token_opens_its_adapter_and_is_written_nowhere(
    gateway: Gateway, openai: OpenAI, ask: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        if ask == "embedding":
            openai.embeddings.create(model=PRIVATE, input=SAID, extra_body={"api_token": TOKEN})
        else:
            assert ask(openai, PRIVATE, api_token=TOKEN) == (PRIVATE, f"{PRIVATE}: {SAID}")
        with pytest.raises(NotFoundError):
            chat(openai, PRIVATE, api_token="hf_guess")
        with pytest.raises(NotFoundError):
            chat(openai, PRIVATE)
    assert TOKEN not in caplog.text
    home = gateway.adapter_dir.parents[1]
    kept = [path for path in home.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert kept == []


@pytest.mark.parametrize("model", UNKNOWN)
@pytest.mark.parametrize("route", ["chat/completions", "completions", "responses", "embeddings"])
def test_what_is_neither_registered_nor_permitted_is_no_model(gateway: Gateway, route: str, model: str) -> None:
    answer = post(gateway, route, model=model)
    assert repr(model) in assert_problem(answer, 404, "model_not_found", "model")


def test_source_that_is_said_and_not_permitted_is_told_as_such(openai: OpenAI) -> None:
    with pytest.raises(PermissionDeniedError, match="request_adapters"):
        chat(openai, "other/tales", adapter_source="hub")


def test_tenant_without_such_a_limit_names_what_is_registered_alone(gateway: Gateway) -> None:
    _, key = gateway.new_tenant("registered alone")
    for model in (address_of(gateway, LOCAL), HUB, ADDRESS):
        assert_problem(post(gateway, "chat/completions", key, model=model), 404, "model_not_found", "model")


def test_composition_of_adapters_that_nobody_registered(gateway: Gateway, openai: OpenAI) -> None:
    other = str(write_adapter(gateway.adapter_dir / "other", rank=7))
    parts: list[dict[str, Any]] = [{"model": address_of(gateway, LOCAL), "weight": 0.5}, {"model": other}]
    assert chat(openai, BASE, adapters=parts) == (BASE, f"{parts[0]['model']}*0.5+{other}*1: {SAID}")


def test_batch_names_adapters_that_nobody_registered(gateway: Gateway) -> None:
    names = [address_of(gateway, LOCAL), HUB, "other/tales"]
    with gateway.client() as client:
        lines = jsonl(*(request_line(f"line-{place}", SAID, model=name) for place, name in enumerate(names)))
        batch = wait(client, begin(client, lines))
        texts = [text_of(line) for line in lines_of(client, batch["output_file_id"])]
        assert [text.endswith(f"tales: {SAID}") for text in texts] == [True, True]
        (refused,) = lines_of(client, batch["error_file_id"])
    assert refused["response"]["body"]["error"]["code"] == "model_not_found"


def test_tokens_are_those_of_the_adapter_that_is_named(gateway: Gateway) -> None:
    with gateway.client() as client:
        for model, status in ((address_of(gateway, LOCAL), 200), ("other/tales", 404)):
            assert client.post("/tokenize", json={"prompt": SAID, "model": model}).status_code == status


def test_books_and_metrics_tell_such_adapters_by_their_kind(gateway: Gateway, openai: OpenAI) -> None:
    """Whatever clients name, there are no more names than the catalogue's."""
    for ask in TEXTS:
        ask(openai, HUB)
    openai.embeddings.create(model=HUB, input=SAID)
    with gateway.admin() as admin:
        sums = admin.get("/admin/v1/usage", params={"tenant_id": gateway.tenant_id, "group_by": "model"}).json()
        shown = admin.get("/metrics").text
    assert {one["model"] for one in sums["data"]} <= {BASE, "request-adapter"}
    assert f'model="{HUB}"' not in shown
    assert 'model="request-adapter"' in shown


@pytest.mark.parametrize("model", [{}, {"model": ""}], ids=["missing", "empty"])
@pytest.mark.parametrize("route", ["chat/completions", "completions", "responses", "embeddings"])
def test_no_model_is_the_base(gateway: Gateway, route: str, model: dict[str, str]) -> None:
    answer = post(gateway, route, **model)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == BASE


def test_key_that_may_not_use_the_base_names_its_model(gateway: Gateway) -> None:
    with gateway.admin() as admin:
        body = {"limits": {"allowed_models": ["acme/*"]}}
        key = admin.post(f"/admin/v1/tenants/{gateway.tenant_id}/keys", json=body).json()["key"]
    assert_problem(post(gateway, "chat/completions", key), 403, "model_not_allowed", "model")
    assert post(gateway, "chat/completions", key, model=HUB).status_code == 200


def post(gateway: Gateway, route: str, key: str | None = None, **fields: Any) -> httpx.Response:
    said: dict[str, dict[str, Any]] = {
        "chat/completions": {"messages": [{"role": "user", "content": SAID}]},
        "completions": {"prompt": SAID},
        "responses": {"input": SAID},
        "embeddings": {"input": SAID},
    }
    with gateway.client(key) as client:
        return client.post(f"/v1/{route}", json={**said[route], **fields})


@pytest.mark.parametrize("ask", TEXTS, ids=lambda ask: ask.__name__)
def test_signature_of_an_address_is_not_told_again(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, openai: OpenAI, ask: Callable[..., Any]
) -> None:
    """Neither by the answer, which may be stored, nor as the adapter's name, which figures tell."""
    with gateway.admin() as admin:
        limits = {"request_adapters": ["https://*"]}
        tenant, key = gateway.new_tenant(f"signed-{ask.__name__}")
        assert admin.put(f"/admin/v1/tenants/{tenant}/limits", json=limits).status_code == 200
    store, found = gateway.services.store, str(gateway.adapter_dir / "tales")
    fetch = store.fetch

    async def fetch_here(uri: str, name: str, **given: Any) -> Any:
        assert uri == "https://host.test/tales.zip?signature=secret"
        return await fetch(found, name)

    monkeypatch.setattr(store, "fetch", fetch_here)
    told, text = ask(openai.with_options(api_key=key), "https://host.test/tales.zip?signature=secret")
    assert (told, text) == ("https://host.test/tales.zip", f"https://host.test/tales.zip: {SAID}")


def test_relative_path_is_a_name_of_the_hub(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a place on the server, unless the request says that it is one."""
    monkeypatch.chdir(Path(gateway.adapter_dir).parent)
    assert_problem(post(gateway, "chat/completions", model="mine/tales"), 404, "model_not_found", "model")
