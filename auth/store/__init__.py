"""The database of tenants, keys and the catalogue: tables, migrations, one way to open it."""
