"""Every table, as SQLAlchemy sees it; `migrations/` is how a database gets there. Times are seconds since 1970."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    false,
)

metadata = MetaData()

tenants = Table(
    "tenants",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(128), nullable=False, unique=True),
    Column("created_at", Float, nullable=False),
    Column("limits", JSON, nullable=False, server_default="{}"),
)

# A key that was rotated has two digests until `previous_until`. `pepper` is the fingerprint of the version that the
# digest is under; "" for one that was made before there were versions.
api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("tenant_id", String(32), ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("name", String(128), nullable=False),
    Column("digest", String(64), nullable=False, unique=True),
    Column("last_four", String(4), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=True),
    Column("revoked_at", Float, nullable=True),
    Column("limits", JSON, nullable=False, server_default="{}"),
    Column("role", String(16), nullable=False, server_default="inference"),
    Column("pepper", String(8), nullable=False, server_default=""),
    Column("previous_digest", String(64), nullable=True, unique=True, index=True),
    Column("previous_until", Float, nullable=True),
)

# Keys of operators. The first one is made at the first start, unless the environment brings one.
admin_keys = Table(
    "admin_keys",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("last_four", String(4), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("id", String(32), nullable=False, unique=True),
    Column("name", String(128), nullable=False, server_default="first"),
    Column("revoked_at", Float, nullable=True),
)

# Encrypted; `pepper` is the fingerprint of the version that the key to them comes from.
tenant_secrets = Table(
    "tenant_secrets",
    metadata,
    Column("tenant_id", String(32), ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("encrypted", Text, nullable=False),
    Column("pepper", String(8), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
)

# No foreign keys: what was done outlives whom it was done to, and by. `tenant_id` is the tenant acted on, "" for none.
audit_log = Table(
    "audit_log",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("at", Float, nullable=False, index=True),
    Column("key_id", String(32), nullable=False, index=True),
    Column("role", String(16), nullable=False),
    Column("action", String(64), nullable=False),
    Column("object", String(512), nullable=False),
    Column("tenant_id", String(64), nullable=False, index=True),
    Column("details", JSON, nullable=False),
    Column("address", String(64), nullable=False),
    Column("request_id", String(128), nullable=False),
    Column("outcome", String(64), nullable=False),
    Column("status", Integer, nullable=True),
    Column("ended_at", Float, nullable=True),
)

# A number for each topic, raised with every change that other processes must learn of.
changes = Table(
    "changes",
    metadata,
    Column("topic", String(32), primary_key=True),
    Column("number", BigInteger, nullable=False),
)

# tenant_id is "" for an adapter that every tenant may use, so that it can be part of the key. Requests are served by
# `current_version`; `wanted_version` becomes it once it is ready. A name with `targets` is a route to other names.
adapters = Table(
    "adapters",
    metadata,
    Column("tenant_id", String(32), primary_key=True),
    Column("name", String(128), primary_key=True),
    Column("current_version", Integer, nullable=True),
    Column("wanted_version", Integer, nullable=False, server_default="1"),
    Column("pinned", Boolean, nullable=False, server_default=false()),
    Column("targets", JSON(none_as_null=True), nullable=True),
    Column("last_used_at", Float, nullable=True),
    Column("created_at", Float, nullable=False),
)

# One row a request, written once when it is over. Rows refer to nothing: a bill outlives its tenant.
usage_records = Table(
    "usage_records",
    metadata,
    Column("request_id", String(64), primary_key=True),
    Column("trace_id", String(128), nullable=False),
    Column("route", String(128), nullable=False),
    Column("tenant_id", String(32), nullable=False),
    Column("key_id", String(32), nullable=False),
    Column("model", String(256), nullable=False),
    Column("adapter_id", String(64), nullable=False),
    Column("num_prompt_tokens", BigInteger, nullable=False),
    Column("num_cached_tokens", BigInteger, nullable=False),
    Column("num_completion_tokens", BigInteger, nullable=False),
    Column("began_at", Float, nullable=False),
    Column("first_token_at", Float, nullable=True),
    Column("ended_at", Float, nullable=True),
    Column("outcome", String(64), nullable=False),
    Index("ix_usage_records_began_at", "began_at", "request_id"),
    Index("ix_usage_records_tenant_id", "tenant_id", "began_at"),
)

# What the rows above come to, kept when they are pruned. `day` is the UTC date that the requests began on: 2027-01-31.
usage_days = Table(
    "usage_days",
    metadata,
    Column("day", String(10), primary_key=True),
    Column("tenant_id", String(32), primary_key=True),
    Column("key_id", String(32), primary_key=True),
    Column("model", String(256), primary_key=True),
    Column("num_requests", BigInteger, nullable=False),
    Column("num_prompt_tokens", BigInteger, nullable=False),
    Column("num_cached_tokens", BigInteger, nullable=False),
    Column("num_completion_tokens", BigInteger, nullable=False),
    Index("ix_usage_days_tenant_id", "tenant_id", "day"),
)

# `adapter_id` is the hash of the content, "" until it is known; from then on the version is that content for ever.
adapter_versions = Table(
    "adapter_versions",
    metadata,
    Column("tenant_id", String(32), primary_key=True),
    Column("name", String(128), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("source", String(4096), nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", String(4096), nullable=False, server_default=""),
    Column("adapter_id", String(64), nullable=False, server_default=""),
    Column("revision", String(4096), nullable=False, server_default=""),
    Column("num_bytes", BigInteger, nullable=False, server_default="0"),
    Column("card", JSON(none_as_null=True), nullable=True),
    Column("notes", JSON, nullable=False, server_default="[]"),
    Column("created_at", Float, nullable=False),
    ForeignKeyConstraint(["tenant_id", "name"], ["adapters.tenant_id", "adapters.name"], ondelete="CASCADE"),
)

# What tenants uploaded and batches answered; the bytes lie in a directory under the same id. tenant_id is "" for files
# of admins.
files = Table(
    "files",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("tenant_id", String(32), nullable=False, index=True),
    Column("filename", String(256), nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=True),
)

# `moments` says when the batch entered each state. `owner` is the gateway that works on
# it, until `leased_until` unless it says otherwise.
batches = Table(
    "batches",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("tenant_id", String(32), nullable=False, index=True),
    Column("key_id", String(32), nullable=False),
    Column("endpoint", String(64), nullable=False),
    Column("input_file_id", String(32), nullable=False),
    Column("status", String(16), nullable=False, index=True),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("moments", JSON, nullable=False),
    Column("details", JSON, nullable=True),
    Column("errors", JSON, nullable=True),
    Column("output_seconds", Integer, nullable=True),
    Column("output_file_id", String(32), nullable=True),
    Column("error_file_id", String(32), nullable=True),
    Column("num_total", Integer, nullable=False, server_default="0"),
    Column("num_completed", Integer, nullable=False, server_default="0"),
    Column("num_failed", Integer, nullable=False, server_default="0"),
    Column("num_prompt_tokens", BigInteger, nullable=False, server_default="0"),
    Column("num_cached_tokens", BigInteger, nullable=False, server_default="0"),
    Column("num_completion_tokens", BigInteger, nullable=False, server_default="0"),
    Column("num_reasoning_tokens", BigInteger, nullable=False, server_default="0"),
    Column("owner", String(32), nullable=True),
    Column("leased_until", Float, nullable=True),
    Column("num_deaths", Integer, nullable=False, server_default="0"),
)

# The answers of a batch that is not over, one a line of its input; the key is why none is answered twice.
batch_answers = Table(
    "batch_answers",
    metadata,
    Column("batch_id", String(32), ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True),
    Column("line", Integer, primary_key=True),
    Column("is_error", Boolean, nullable=False),
    Column("answer", Text, nullable=False),
)

# Answers of /v1/responses that later ones may go on from. tenant_id is null for those of admins; `items` is what the
# request said, `response` the object as JSON.
responses = Table(
    "responses",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant_id", String(32), ForeignKey("tenants.id", ondelete="CASCADE"), nullable=True, index=True),
    Column("previous_id", String(64), nullable=True),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False, index=True),
    Column("response", Text, nullable=False),
    Column("items", JSON, nullable=False),
)
