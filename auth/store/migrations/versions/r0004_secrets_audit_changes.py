"""Tenants' secrets, the audit log, numbers of changes, admin keys that can be told apart and revoked."""

import secrets
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("tenants", sa.Column("log_prompts", sa.Boolean, nullable=False, server_default=sa.false()))
    op.create_table(
        "tenant_secrets",
        sa.Column("tenant_id", sa.String(32), sa.ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("encrypted", sa.Text, nullable=False),
        sa.Column("pepper", sa.String(8), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("updated_at", sa.Float, nullable=False),
    )
    op.create_table(
        "audit_log",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("key_id", sa.String(32), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("object", sa.String(512), nullable=False),
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.Column("details", sa.JSON, nullable=False),
        sa.Column("address", sa.String(64), nullable=False),
        sa.Column("request_id", sa.String(128), nullable=False),
        sa.Column("outcome", sa.String(64), nullable=False),
        sa.Column("status", sa.Integer, nullable=True),
        sa.Column("ended_at", sa.Float, nullable=True),
    )
    for column in ("at", "key_id", "tenant_id"):
        op.create_index(f"ix_audit_log_{column}", "audit_log", [column])
    changes = op.create_table(
        "changes",
        sa.Column("topic", sa.String(32), primary_key=True),
        sa.Column("number", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(changes, [{"topic": "access", "number": 0}])
    _remake_admin_keys(
        [
            sa.Column("id", sa.String(32), nullable=False, unique=True),
            sa.Column("name", sa.String(128), nullable=False, server_default="first"),
            sa.Column("revoked_at", sa.Float, nullable=True),
        ]
    )


def downgrade() -> None:
    _remake_admin_keys([])
    op.drop_table("changes")
    op.drop_table("audit_log")
    op.drop_table("tenant_secrets")
    op.drop_column("tenants", "log_prompts")


def _remake_admin_keys(more: list[sa.Column[Any]]) -> None:
    """SQLite can neither add a column that must be unique nor drop one, so the table is made anew."""
    keep = "" if more else " WHERE revoked_at IS NULL"  # what came before knows no revoked ones
    known = op.get_bind().execute(sa.text(f"SELECT digest, last_four, created_at FROM admin_keys{keep}")).all()
    op.drop_table("admin_keys")
    admin_keys = op.create_table(
        "admin_keys",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("last_four", sa.String(4), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        *more,
    )
    ids = [{"id": f"admin_{secrets.token_hex(8)}"} if more else {} for _ in known]
    if known:
        op.bulk_insert(admin_keys, [{**row._mapping, **own} for row, own in zip(known, ids, strict=True)])
