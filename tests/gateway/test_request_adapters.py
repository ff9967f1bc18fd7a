"""Adapters that a request names itself: from the catalogue, from sources its tenant may use, and compositions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from openai import BadRequestError, NotFoundError, OpenAI
from support.adapter_files import adapter_files, write_files
from support.gateway import BASE, Gateway, settings_in, write_adapter
from support.hub_server import FakeHub, serve_hub

from loraplex.auth.caller import Caller
from loraplex.auth.limits.policy import Limits, Policy
from loraplex.auth.store.database import open_database
from loraplex.engines.adapters.store import AdapterStore
from loraplex.engines.echo import EchoEngine
from loraplex.engines.errors import AdapterNotFound, AdapterSourceForbidden
from loraplex.gateway.catalogue import Catalogue
from loraplex.gateway.errors import MalformedRequest, ModelNotAllowed, ModelNotFound, UnsupportedParameter
from loraplex.gateway.request_adapters import MergedAdapters, RequestAdapters

TOKEN = "hf_of_acme"


def caller(*patterns: str, tenant: str = "t1", **key: Any) -> Caller:
    tenant_limits = Limits(request_adapters=patterns or None)
    policy = Policy(tenant=tenant_limits, key=Limits(**key))
    return Caller(tenant_id=tenant, tenant_name=tenant, key_id="k", role="inference", policy=policy)


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serve_hub() as served:
        yield served


@pytest_asyncio.fixture
async def adapters(tmp_path: Path, hub: FakeHub) -> AsyncIterator[RequestAdapters]:
    """Over a catalogue with one local adapter, `known`."""
    settings = settings_in(tmp_path)
    database = await open_database(settings.database.url)
    store = AdapterStore(msgspec.structs.replace(settings.adapters, hub_endpoint=hub.url))
    catalogue = Catalogue(database, store, EchoEngine(settings), BASE)
    await catalogue.register("known", str(write_adapter(tmp_path / "local" / "known")))
    yield RequestAdapters(catalogue, trust_seconds=60)
    await store.close()
    await database.dispose()


async def test_no_adapter_is_the_base(adapters: RequestAdapters) -> None:
    for adapter_id in (None, "", BASE):
        assert (await adapters.route(caller(), adapter_id=adapter_id)).adapter is None


@pytest.mark.parametrize("source", [None, "local", "LOCAL", "hub", "s3"])
async def test_name_of_the_catalogue_needs_no_permission(adapters: RequestAdapters, source: str | None) -> None:
    adapter = (await adapters.route(caller(), adapter_id="known", adapter_source=source)).adapter
    assert adapter is not None
    assert adapter.name == "known"


async def test_unregistered_adapter_is_unknown_without_a_permission(adapters: RequestAdapters, hub: FakeHub) -> None:
    hub.repository("org/name", adapter_files())
    with pytest.raises(ModelNotFound):
        await adapters.route(caller(), adapter_id="org/name")
    with pytest.raises(AdapterSourceForbidden, match="request_adapters"):
        await adapters.route(caller(), adapter_id="org/name", adapter_source="hub")
    with pytest.raises(AdapterSourceForbidden):
        await adapters.route(caller("hf://other/*"), adapter_id="org/name")
    assert hub.requests == []


async def test_permitted_hub_adapter_is_served(adapters: RequestAdapters, hub: FakeHub) -> None:
    hub.repository("org/name", adapter_files())
    for adapter_id, source in (
        ("org/name", None),
        ("org/name", "hub"),
        ("hf://org/name", None),
        ("hf://org/name", "hub"),
    ):
        adapter = (await adapters.route(caller("hf://org/*"), adapter_id=adapter_id, adapter_source=source)).adapter
        assert adapter is not None
        assert (Path(adapter.path) / "adapter_config.json").read_bytes() == adapter_files()["adapter_config.json"]


async def test_permitted_local_adapter_is_served_and_its_neighbour_not(
    adapters: RequestAdapters, tmp_path: Path
) -> None:
    mine, other = (write_files(tmp_path / "local" / name, adapter_files(1)) for name in ("mine", "other"))
    who = caller(f"file://{mine}*")
    assert (await adapters.route(who, adapter_id=str(mine), adapter_source="local")).adapter is not None
    for path in (other, mine / ".." / "other"):
        with pytest.raises(AdapterSourceForbidden):
            await adapters.route(who, adapter_id=str(path), adapter_source="local")


async def test_key_narrows_what_its_tenant_may(adapters: RequestAdapters, hub: FakeHub) -> None:
    hub.repository("org/name", adapter_files())
    with pytest.raises(AdapterSourceForbidden):
        await adapters.route(caller("*", request_adapters=("s3://*",)), adapter_id="org/name")
    with pytest.raises(ModelNotAllowed):
        await adapters.route(caller("*", allowed_models=("known",)), adapter_id="org/name")
    assert hub.requests == []


async def test_what_a_token_opened_stays_with_who_gave_it(adapters: RequestAdapters, hub: FakeHub) -> None:
    repository, _ = hub.repository("acme/private", adapter_files())
    repository.token = TOKEN
    acme, other = caller("hf://*"), caller("hf://*", tenant="t2")
    assert (await adapters.route(acme, adapter_id="acme/private", api_token=TOKEN)).adapter is not None
    for who, token in ((acme, None), (other, None), (other, "hf_guess")):
        with pytest.raises(AdapterNotFound):
            await adapters.route(who, adapter_id="acme/private", api_token=token)


async def test_source_is_asked_once_while_its_answer_is_trusted(adapters: RequestAdapters, hub: FakeHub) -> None:
    hub.repository("org/name", adapter_files())
    for _ in range(3):
        await adapters.route(caller("hf://*"), adapter_id="org/name")
    assert hub.count("GET", "/revision/") == 1


async def test_linear_merge_is_a_composition(adapters: RequestAdapters, hub: FakeHub) -> None:
    hub.repository("org/name", adapter_files())
    merged = MergedAdapters(ids=("known", "org/name"), weights=(0.25, -1.0), density=0.0)
    route = await adapters.route(caller("hf://*"), merged=merged)
    assert [(part.adapter.name, part.weight) for part in route.composition] == [("known", 0.25), ("org/name", -1.0)]
    assert route.adapter is None


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"adapter_id": "known", "adapter_source": "pbase"}, UnsupportedParameter),
        ({"adapter_id": "s3://bucket/a", "adapter_source": "hub"}, MalformedRequest),
        ({"adapter_id": "known", "merged": MergedAdapters(ids=("known",), weights=(1.0,))}, MalformedRequest),
        ({"merged": MergedAdapters(ids=("known",), weights=())}, MalformedRequest),
        ({"merged": MergedAdapters(ids=("known",), weights=(float("nan"),))}, MalformedRequest),
        ({"merged": MergedAdapters(ids=("known",), weights=(-100.5,))}, MalformedRequest),
        ({"merged": MergedAdapters(ids=("known", "known"), weights=(1.0, 1.0))}, MalformedRequest),
        ({"merged": MergedAdapters(ids=(BASE,), weights=(1.0,))}, MalformedRequest),
        ({"merged": MergedAdapters(ids=("known",), weights=(1.0,), merge_strategy="ties")}, MalformedRequest),
    ],
)
async def test_what_cannot_be_is_refused(adapters: RequestAdapters, arguments: dict[str, Any], error: type) -> None:
    with pytest.raises(error):
        await adapters.route(caller("*"), **arguments)


def _chat(gateway: Gateway, model: str, **extra: Any) -> str | None:
    messages: Any = [{"role": "user", "content": "hi"}]
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.api_key, max_retries=0) as client:
        answer = client.chat.completions.create(model=model, messages=messages, extra_body=extra)
    return answer.choices[0].message.content


def test_openai_request_composes_adapters(gateway: Gateway) -> None:
    source = write_adapter(gateway.adapter_dir / "composed-two", rank=7)
    with gateway.admin() as admin:
        assert admin.post("/admin/v1/adapters", json={"name": "two", "source": str(source)}).status_code == 201
    adapters = [{"model": "team/echo-one", "weight": 0.5}, {"model": "two"}]
    assert _chat(gateway, BASE, adapters=adapters) == "team/echo-one*0.5+two*1: hi"
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.api_key) as client:
        answer = client.completions.create(model=BASE, prompt="hi", max_tokens=64, extra_body={"adapters": adapters})
    assert answer.choices[0].text == "team/echo-one*0.5+two*1: hi"


@pytest.mark.parametrize(
    ("model", "adapters", "error", "param"),
    [
        ("team/echo-one", [{"model": "team/echo-one"}], BadRequestError, "model"),
        (BASE, [], BadRequestError, "adapters"),
        (BASE, [{"model": BASE}], BadRequestError, "adapters[0].model"),
        (BASE, [{"model": "team/echo-one"}, {"model": "team/echo-one", "weight": 2}], BadRequestError, "adapters"),
        (BASE, [{"model": "nothing"}], NotFoundError, "model"),
        (BASE, [{"model": "team/echo-one", "weight": 1e9}], BadRequestError, "adapters[0].weight"),
        (BASE, [{"model": "team/echo-one", "scale": 1}], BadRequestError, "adapters[0].scale"),
    ],
)
def test_openai_composition_that_cannot_be_is_refused_by_name(
    gateway: Gateway, model: str, adapters: list[Any], error: Any, param: str
) -> None:
    with pytest.raises(error) as refused:
        _chat(gateway, model, adapters=adapters)
    assert refused.value.param == param
