"""The operator's REST API under /admin/v1: tenants, keys, adapters."""
