"""/admin/v1/tenants/{tenant_id}/secrets: what the server may use for a tenant, such as a hub token; never shown."""

import re
from typing import Annotated, Any

import msgspec
from litestar import Request, Response, delete, get, put
from litestar.handlers import HTTPRouteHandler
from msgspec import Struct

from loraplex.auth.secrets import SecretCard, TenantSecrets
from loraplex.auth.tenants import Tenants
from loraplex.gateway.decoding import Body
from loraplex.gateway.errors import MalformedRequest
from loraplex.gateway.guards import require_tenant_admin
from loraplex.gateway.replies import json_reply
from loraplex.gateway.source_tokens import SECRET_OF

_SECRETS = "/admin/v1/tenants/{tenant_id:str}/secrets"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


class SecretValue(Struct, forbid_unknown_fields=True):
    value: Annotated[str, msgspec.Meta(min_length=1, max_length=8192)]


class SecretList(Struct):
    data: list[SecretCard]


_value = Body(SecretValue)


def secret_routes(tenants: Tenants, secrets: TenantSecrets) -> list[HTTPRouteHandler]:
    """The handlers of this resource."""

    async def tenant_of(request: Request[Any, Any, Any]) -> str:
        """Raises TenantNotFound."""
        return (await tenants.get_tenant(request.path_params["tenant_id"])).id

    @get(_SECRETS, guards=[require_tenant_admin])
    async def list_secrets(request: Request[Any, Any, Any]) -> Response[bytes]:
        return json_reply(SecretList(await secrets.list(await tenant_of(request))))

    @put(_SECRETS + "/{name:str}", guards=[require_tenant_admin])
    async def put_secret(request: Request[Any, Any, Any]) -> Response[bytes]:
        name = _used(request.path_params["name"])
        wanted = await _value.of(request)
        return json_reply(await secrets.put(await tenant_of(request), name, wanted.value))

    @delete(_SECRETS + "/{name:str}", guards=[require_tenant_admin])
    async def delete_secret(request: Request[Any, Any, Any]) -> None:
        name = _checked(request.path_params["name"])
        await secrets.remove(await tenant_of(request), name)

    return [list_secrets, put_secret, delete_secret]


def _used(name: str) -> str:
    """Raises MalformedRequest: under another name a token would lie there and never be sent."""
    if name not in SECRET_OF.values():
        raise MalformedRequest(f"The secrets that are used are {', '.join(SECRET_OF.values())}.", "name")
    return name


def _checked(name: str) -> str:
    """Raises MalformedRequest."""
    if _NAME.fullmatch(name) is None:
        raise MalformedRequest(
            "The name of a secret is 1 to 64 small letters, digits and underscores, a letter first.", "name"
        )
    return name
