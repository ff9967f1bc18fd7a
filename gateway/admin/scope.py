"""Whose adapters an admin request is about, and which sources its caller may have read."""

from typing import Any

from litestar import Request

from loraplex.auth.caller import Caller
from loraplex.auth.errors import TenantNotFound
from loraplex.auth.tenants import Tenants
from loraplex.engines.errors import AdapterSourceForbidden
from loraplex.gateway.adapter_records import SHARED
from loraplex.gateway.audit import without_credentials
from loraplex.gateway.catalogue import Catalogue
from loraplex.gateway.guards import caller_of


def scope_of(request: Request[Any, Any, Any], default: Any = SHARED) -> Any:
    """The tenant that the query names, or `default`; for a tenant's own key always that tenant.

    Raises TenantNotFound where such a key names another.
    """
    caller = caller_of(request)
    asked = request.query_params.get("tenant_id")
    if caller.role == "admin":
        return default if asked is None else asked
    if asked not in (None, caller.tenant_id):
        raise TenantNotFound(f"There is no tenant {asked!r}.")
    return caller.tenant_id


async def own_or_named(caller: Caller, asked: str | None, tenants: Tenants) -> str:
    """The tenant that something new is for; "" for all. Raises TenantNotFound."""
    if caller.role != "admin":
        if asked not in (None, caller.tenant_id):
            raise TenantNotFound(f"There is no tenant {asked!r}.")
        return caller.tenant_id
    if asked is None:
        return SHARED
    return (await tenants.get_tenant(asked)).id


async def require_fetchable(caller: Caller, source: str, catalogue: Catalogue) -> None:
    """Admins may register from wherever the settings allow; a tenant from public places, with its own credentials, or
    from where its limits let requests fetch from: local directories and the gateway's own buckets hold others' files.

    Raises AdapterError.
    """
    told = without_credentials(source)  # not the address, which says where on this machine a relative path leads
    refusal = AdapterSourceForbidden(f"{told}: this tenant may not register adapters from here")
    try:
        address = await catalogue.store.address(source)
    except AdapterSourceForbidden:
        if caller.role == "admin":
            raise
        raise refusal from None  # another word would tell which directories there are
    if address.startswith("upload:"):
        raise AdapterSourceForbidden(f"{told}: uploads are registered by sending the files")
    if caller.role == "admin" or address.startswith(("hf://", "https://")) or caller.policy.may_fetch(address):
        return
    if address.startswith("s3://") and await catalogue.has_token(caller.tenant_id, address):
        return
    raise refusal
