"""/admin/v1/admin-keys: made, listed, revoked. The one that the environment brings is not among them."""

from typing import Any

from litestar import Request, Response, delete, get, post
from litestar.handlers import HTTPRouteHandler
from msgspec import Struct

from loraplex.auth.admin_keys import AdminKey, AdminKeys
from loraplex.gateway.admin.keys import Name
from loraplex.gateway.audit import tell_audit
from loraplex.gateway.decoding import Body
from loraplex.gateway.guards import require_admin
from loraplex.gateway.replies import json_reply


class NewAdminKey(Struct, forbid_unknown_fields=True):
    name: Name


class AdminKeyList(Struct):
    data: list[AdminKey]


_new_key = Body(NewAdminKey)


def admin_key_routes(admins: AdminKeys) -> list[HTTPRouteHandler]:
    """The handlers of this resource."""

    @post("/admin/v1/admin-keys", guards=[require_admin])
    async def create_admin_key(request: Request[Any, Any, Any]) -> Response[bytes]:
        key = await admins.create((await _new_key.of(request)).name)
        tell_audit(request, f"admin-keys/{key.id}", name=key.name, last_four=key.last_four)
        return json_reply(key, 201)

    @get("/admin/v1/admin-keys", guards=[require_admin])
    async def list_admin_keys() -> Response[bytes]:
        return json_reply(AdminKeyList(await admins.list()))

    @delete("/admin/v1/admin-keys/{key_id:str}", guards=[require_admin])
    async def revoke_admin_key(request: Request[Any, Any, Any]) -> None:
        await admins.revoke(request.path_params["key_id"])

    return [create_admin_key, list_admin_keys, revoke_admin_key]
