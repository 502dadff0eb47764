"""How this project opens its own databases (ledger, traffic): SQLite for several processes, or any other."""

from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event

WRITES = "evergreen_writes"
"""Execution option of a connection that will write: its transactions begin when no other writes."""


def open_engine(url: str) -> sa.Engine:
    """An engine whose commits survive a power cut. Raises ValueError for a database in memory: other
    processes could not open it."""
    engine = sa.create_engine(url, pool_pre_ping=True)
    if engine.dialect.name == "sqlite":
        if engine.url.database in (None, "", ":memory:"):
            raise ValueError(f"{url}: expected a database that other processes can open, not memory")
        Path(engine.url.database).parent.mkdir(parents=True, exist_ok=True)

        @event.listens_for(engine, "connect")
        def _configure(connection: Any, _record: Any) -> None:
            connection.isolation_level = None  # the module's own BEGIN would leave CREATE TABLE out
            connection.execute("PRAGMA busy_timeout = 30000")
            connection.execute("PRAGMA synchronous = FULL")

        @event.listens_for(engine, "begin")
        def _begin(connection: sa.Connection) -> None:
            # a reader that became a writer half way would fail where it may wait now
            writes = connection.get_execution_options().get(WRITES)
            connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def write_ahead(engine: sa.Engine) -> None:
    """Switch a SQLite database to its write-ahead log. It fails when several processes do it at once: hold a
    lock."""
    raw = engine.raw_connection()  # outside of a transaction
    raw.cursor().execute("PRAGMA journal_mode = WAL")
    raw.close()
