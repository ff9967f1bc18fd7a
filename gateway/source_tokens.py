"""Credentials for sources, out of what tenants entrust to the server."""

from loraplex.auth.secrets import TenantSecrets

# scheme of a source -> name of the secret
SECRET_OF = {"hf": "hub_token", "s3": "s3_token", "https": "https_token"}


class SecretTokens:
    """Implements `SourceTokens`: a tenant's token is used for that tenant's adapters alone."""

    def __init__(self, secrets: TenantSecrets) -> None:
        self._secrets = secrets

    async def token_for(self, tenant_id: str, address: str) -> str | None:
        """None where the tenant keeps none for such a source. Raises SecretUnreadable."""
        name = SECRET_OF.get(address.partition(":")[0])
        return None if name is None or not tenant_id else await self._secrets.reveal(tenant_id, name)
