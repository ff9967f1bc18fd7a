"""How many gateways in a row died while they worked on a batch."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.add_column("batches", sa.Column("num_deaths", sa.Integer, nullable=False, server_default="0"))


def downgrade() -> None:
    op.drop_column("batches", "num_deaths")
