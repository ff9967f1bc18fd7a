"""Whether prompts are logged is said among the limits, of a tenant or of a key; the column was never read."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.drop_column("tenants", "log_prompts")


def downgrade() -> None:
    op.add_column("tenants", sa.Column("log_prompts", sa.Boolean, nullable=False, server_default=sa.false()))
