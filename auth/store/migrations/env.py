"""Alembic runs this for every command; `database.py` hands it an open connection."""

from alembic import context

from loraplex.auth.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
