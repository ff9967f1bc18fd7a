"""Files of tenants, and batches of requests with the answers they have so far."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "files",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("tenant_id", sa.String(32), nullable=False, index=True),
        sa.Column("filename", sa.String(256), nullable=False),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("num_bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("expires_at", sa.Float, nullable=True),
    )
    op.create_table(
        "batches",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("tenant_id", sa.String(32), nullable=False, index=True),
        sa.Column("key_id", sa.String(32), nullable=False),
        sa.Column("endpoint", sa.String(64), nullable=False),
        sa.Column("input_file_id", sa.String(32), nullable=False),
        sa.Column("status", sa.String(16), nullable=False, index=True),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("expires_at", sa.Float, nullable=False),
        sa.Column("moments", sa.JSON, nullable=False),
        sa.Column("details", sa.JSON, nullable=True),
        sa.Column("errors", sa.JSON, nullable=True),
        sa.Column("output_seconds", sa.Integer, nullable=True),
        sa.Column("output_file_id", sa.String(32), nullable=True),
        sa.Column("error_file_id", sa.String(32), nullable=True),
        *(
            sa.Column(name, sa.Integer, nullable=False, server_default="0")
            for name in ("num_total", "num_completed", "num_failed")
        ),
        *(
            sa.Column(name, sa.BigInteger, nullable=False, server_default="0")
            for name in ("num_prompt_tokens", "num_cached_tokens", "num_completion_tokens", "num_reasoning_tokens")
        ),
        sa.Column("owner", sa.String(32), nullable=True),
        sa.Column("leased_until", sa.Float, nullable=True),
    )
    op.create_table(
        "batch_answers",
        sa.Column("batch_id", sa.String(32), sa.ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("line", sa.Integer, primary_key=True),
        sa.Column("is_error", sa.Boolean, nullable=False),
        sa.Column("answer", sa.Text, nullable=False),
    )


def downgrade() -> None:
    for name in ("batch_answers", "batches", "files"):
        op.drop_table(name)
