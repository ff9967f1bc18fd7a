"""Usage records written as the ledger writes them, without a ledger."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.ext.asyncio import AsyncEngine

from loraplex.auth.ledger.rows import row_writer
from loraplex.auth.metering import UsageRecord


async def write_records(database: AsyncEngine, records: Sequence[UsageRecord]) -> None:
    writer = row_writer(database)
    try:
        await writer.insert(records)
    finally:
        await writer.close()
