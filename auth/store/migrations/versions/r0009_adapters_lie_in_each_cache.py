"""Where a version's files lie follows from its content and from the cache of the gateway that asks."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.drop_column("adapter_versions", "path")


def downgrade() -> None:
    op.add_column("adapter_versions", sa.Column("path", sa.String(4096), nullable=False, server_default=""))
