"""Limits of tenants and keys, roles of keys, and the second secret of a key that is being rotated."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("tenants", sa.Column("limits", sa.JSON, nullable=False, server_default="{}"))
    op.add_column("api_keys", sa.Column("limits", sa.JSON, nullable=False, server_default="{}"))
    op.add_column("api_keys", sa.Column("role", sa.String(16), nullable=False, server_default="inference"))
    op.add_column("api_keys", sa.Column("pepper", sa.String(8), nullable=False, server_default=""))
    op.add_column("api_keys", sa.Column("previous_digest", sa.String(64), nullable=True))
    op.add_column("api_keys", sa.Column("previous_until", sa.Float, nullable=True))
    op.create_index("ix_api_keys_previous_digest", "api_keys", ["previous_digest"], unique=True)


def downgrade() -> None:
    op.drop_index("ix_api_keys_previous_digest", "api_keys")
    for column in ("previous_until", "previous_digest", "pepper", "role", "limits"):
        op.drop_column("api_keys", column)
    op.drop_column("tenants", "limits")
