"""Versions of adapters with their states, and weighted routes between adapters."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

_MOVED: dict[str, tuple[sa.types.TypeEngine[Any], str]] = {
    "adapter_id": (sa.String(64), ""),
    "path": (sa.String(4096), ""),
    "source": (sa.String(4096), ""),
    "revision": (sa.String(4096), ""),
    "num_bytes": (sa.BigInteger(), "0"),
    "card": (sa.JSON(), "{}"),
}


def upgrade() -> None:
    op.create_table(
        "adapter_versions",
        sa.Column("tenant_id", sa.String(32), primary_key=True),
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("source", sa.String(4096), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.String(4096), nullable=False, server_default=""),
        sa.Column("adapter_id", sa.String(64), nullable=False, server_default=""),
        sa.Column("path", sa.String(4096), nullable=False, server_default=""),
        sa.Column("revision", sa.String(4096), nullable=False, server_default=""),
        sa.Column("num_bytes", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("card", sa.JSON, nullable=True),
        sa.Column("notes", sa.JSON, nullable=False, server_default="[]"),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.ForeignKeyConstraint(["tenant_id", "name"], ["adapters.tenant_id", "adapters.name"], ondelete="CASCADE"),
    )
    op.execute(
        "INSERT INTO adapter_versions (tenant_id, name, number, state, created_at, adapter_id, path, source, revision,"
        " num_bytes, card) SELECT tenant_id, name, 1, 'ready', created_at, adapter_id, path, source, revision,"
        " num_bytes, card FROM adapters"
    )
    op.add_column("adapters", sa.Column("current_version", sa.Integer, nullable=True))
    op.add_column("adapters", sa.Column("wanted_version", sa.Integer, nullable=False, server_default="1"))
    op.add_column("adapters", sa.Column("pinned", sa.Boolean, nullable=False, server_default=sa.false()))
    op.add_column("adapters", sa.Column("targets", sa.JSON, nullable=True))
    op.add_column("adapters", sa.Column("last_used_at", sa.Float, nullable=True))
    op.execute("UPDATE adapters SET current_version = 1")
    op.execute("INSERT INTO changes (topic, number) VALUES ('catalogue', 0)")
    for column in _MOVED:
        op.drop_column("adapters", column)


def downgrade() -> None:
    """What has no version that is ready is lost, and so are weighted routes."""
    op.execute("DELETE FROM changes WHERE topic = 'catalogue'")
    op.execute("DELETE FROM adapters WHERE current_version IS NULL")
    for column, (kind, default) in _MOVED.items():
        op.add_column("adapters", sa.Column(column, kind, nullable=False, server_default=default))
        op.execute(
            f"UPDATE adapters SET {column} = (SELECT v.{column} FROM adapter_versions v WHERE"
            " v.tenant_id = adapters.tenant_id AND v.name = adapters.name AND v.number = adapters.current_version)"
        )
    for column in ("last_used_at", "targets", "pinned", "wanted_version", "current_version"):
        op.drop_column("adapters", column)
    op.drop_table("adapter_versions")
