"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, GET /version.

What vLLM keeps until it restarts is here an entry of the catalogue: an admin's is shared, a tenant's own admin's is its
tenant's. An admin names a tenant with the query `?tenant_id=`.
"""

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from litestar import Request, Response, get, post
from litestar.handlers import HTTPRouteHandler
from msgspec import UNSET, Raw, Struct, UnsetType

from loraplex.auth.caller import Caller
from loraplex.auth.tenants import Tenants
from loraplex.engines.errors import AdapterError
from loraplex.gateway.admin.scope import require_fetchable, scope_of
from loraplex.gateway.audit import tell_audit, without_credentials
from loraplex.gateway.catalogue import Catalogue
from loraplex.gateway.decoding import Body
from loraplex.gateway.errors import AdapterNameTaken, AdapterNotRegistered, InvalidUserInput
from loraplex.gateway.guards import caller_of, require_tenant_admin
from loraplex.gateway.openai.wire import refuse_what_matters
from loraplex.gateway.replies import json_reply
from loraplex.gateway.vllm.problems import respond_as_vllm


class LoadLoraAdapter(Struct, forbid_unknown_fields=True):
    """`lora_path` is any source of an adapter, and `organisation/name` the hub's where no directory is called so, as in
    vLLM. With `load_inplace` a name that is there gets a new version."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    # known, not offered
    is_3d_lora_weight: Raw | UnsetType = UNSET

    not_offered: ClassVar[dict[str, tuple[Any, ...]]] = {"is_3d_lora_weight": (False,)}


class UnloadLoraAdapter(Struct, forbid_unknown_fields=True):
    """`lora_int_id` is of vLLM's own numbers, and without effect there as here."""

    lora_name: str
    lora_int_id: int | None = None


class Version(Struct):
    version: str


_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
_load, _unload = Body(LoadLoraAdapter), Body(UnloadLoraAdapter)
_options: dict[str, Any] = {
    "status_code": 200,
    "guards": [require_tenant_admin],
    "exception_handlers": {Exception: respond_as_vllm},
}


def vllm_adapter_routes(catalogue: Catalogue, tenants: Tenants) -> list[HTTPRouteHandler]:
    """The handlers of this resource."""

    async def tenant_of(request: Request[Any, Any, Any]) -> str:
        tenant_id: str = scope_of(request)
        return (await tenants.get_tenant(tenant_id)).id if tenant_id else tenant_id

    @post("/v1/load_lora_adapter", **_options)
    async def load_lora_adapter(request: Request[Any, Any, Any]) -> Response[bytes]:
        wanted = await _load.of(request)
        key = await tenant_of(request), wanted.lora_name
        source = await _source(wanted.lora_path, caller_of(request), catalogue)
        tell_audit(request, f"adapters/{wanted.lora_name}", tenant_id=key[0], source=without_credentials(source))
        refuse_what_matters(wanted, wanted.not_offered)
        if not wanted.lora_name or not wanted.lora_path:
            raise InvalidUserInput("Both 'lora_name' and 'lora_path' must be provided.")
        await require_fetchable(caller_of(request), source, catalogue)
        if not catalogue.has(key):
            await catalogue.register(wanted.lora_name, source, key[0])
        elif wanted.load_inplace:
            await catalogue.update(key, source)
        else:
            raise AdapterNameTaken(
                f"The lora adapter '{wanted.lora_name}' is there already. Set 'load_inplace' to give it a new version.",
                "lora_name",
            )
        await catalogue.warm(key)
        return _success(f"LoRA adapter '{wanted.lora_name}' added successfully.")

    @post("/v1/unload_lora_adapter", **_options)
    async def unload_lora_adapter(request: Request[Any, Any, Any]) -> Response[bytes]:
        wanted = await _unload.of(request)
        tenant_id = await tenant_of(request)
        tell_audit(request, f"adapters/{wanted.lora_name}", tenant_id=tenant_id)
        if not wanted.lora_name:
            raise InvalidUserInput("'lora_name' needs to be provided to unload a LoRA adapter.")
        if not catalogue.has((tenant_id, wanted.lora_name)):
            raise AdapterNotRegistered(f"The lora adapter '{wanted.lora_name}' cannot be found.", "lora_name")
        await catalogue.remove(tenant_id, wanted.lora_name)
        return _success(f"LoRA adapter '{wanted.lora_name}' removed successfully.")

    @get("/version")
    async def get_version() -> Response[bytes]:
        return json_reply(Version(version("loraplex")))

    return [load_lora_adapter, unload_lora_adapter, get_version]


async def _source(path: str, caller: Caller, catalogue: Catalogue) -> str:
    """A directory that the caller may not register from is none, or the answer would tell that it is there."""
    if _HUB_NAME.fullmatch(path) is None:
        return path
    try:
        address = await catalogue.store.address(path)
    except AdapterError:
        return f"hf://{path}"
    may_fetch = caller.role == "admin" or caller.policy.may_fetch(address)
    is_there = may_fetch and Path(address.removeprefix("file://")).is_dir()  # noqa: ASYNC240
    return path if is_there else f"hf://{path}"


def _success(text: str) -> Response[bytes]:
    return Response(f"Success: {text}".encode(), media_type="text/plain")
