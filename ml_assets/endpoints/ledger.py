"""Which adapter version serves which customization, since when, moved by whom and on which report.

The ledger is append-only and is the truth that the gateway follows: a release counts when its row is
committed. SQLite (in WAL mode) by default, any SQLAlchemy URL. The same database holds the API keys of the
gateway (`ml_assets.endpoints.gateway.keys`) and the runs that may no longer release anything (the fence).
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import sqlalchemy as sa
from filelock import FileLock
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError

from ml_assets.databases import open_engine, write_ahead
from ml_assets.settings import EngineName

Action = Literal["release", "rollback", "withdraw"]

_metadata = sa.MetaData()

_releases = sa.Table(
    "releases",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("customization", sa.String(200), nullable=False, index=True),
    sa.Column("action", sa.String(20), nullable=False),
    sa.Column("base_revision", sa.String(200), nullable=False),
    sa.Column("base_digest", sa.String(64), nullable=False),
    sa.Column("adapter_digest", sa.String(64), nullable=False),
    sa.Column("report_digest", sa.String(64), nullable=False),
    sa.Column("mlflow_version", sa.String(50), nullable=False),
    sa.Column("max_new_tokens", sa.Integer, nullable=False),
    sa.Column("max_prompt_tokens", sa.Integer, nullable=True),
    sa.Column("run_id", sa.String(100), nullable=False),
    sa.Column("actor", sa.String(200), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("at", sa.String(40), nullable=False),
    sa.Column("engine", sa.String(20), nullable=True),
    sa.Column("traffic_policy", sa.JSON(none_as_null=True), nullable=True),
)
_fenced_runs = sa.Table(
    "fenced_runs",
    _metadata,
    sa.Column("run_id", sa.String(100), primary_key=True),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("at", sa.String(40), nullable=False),
)
# One row. Updating it is the first statement of every release and every fence, so that these wait for one
# another on any database: SQLite then holds its write lock, others the lock of the row.
_writer = sa.Table(
    "writer",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("turn", sa.Integer, nullable=False),
)
api_keys = sa.Table(
    "api_keys",
    _metadata,
    sa.Column("id", sa.String(8), primary_key=True),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("scopes", sa.JSON, nullable=False),
    sa.Column("created_at", sa.String(40), nullable=False),
    sa.Column("expires_at", sa.String(40), nullable=True),
    sa.Column("revoked_at", sa.String(40), nullable=True),
    sa.Column("unlogged", sa.Boolean, nullable=True),
)
# one row; of its own, so that it is added to ledgers that were made before
_ownership = sa.MetaData()
_owner = sa.Table(
    "owner",
    _ownership,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("deployment", sa.Text, nullable=False),
    sa.Column("place", sa.Text, nullable=False),
    sa.Column("at", sa.String(40), nullable=False),
)
# what tables have that were made before there was a use for it
_ADDED = (_releases.c.engine, _releases.c.traffic_policy, api_keys.c.unlogged)
for _change in ("UPDATE", "DELETE"):
    event.listen(
        _releases,
        "after_create",
        sa.DDL(
            f"CREATE TRIGGER releases_no_{_change.lower()} BEFORE {_change} ON releases "
            "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
        ).execute_if(dialect="sqlite"),
    )


class Fenced(Exception):
    """The run may not release any more: it was declared failed. The message gives the run and the reason."""


@dataclass(frozen=True)
class Release:
    """One row of the ledger: from `at` on, `customization` is answered by `adapter_digest`.

    `action` is `release` for a new version, `rollback` for a return to an earlier one, and `withdraw` when
    nothing serves from then on (the digests then name what was withdrawn). `max_new_tokens` and
    `max_prompt_tokens` (None: the base's context) are the limits of the endpoint, `engine` what it says about
    the engine (None: the deployment's), `traffic_policy` how its traffic is stored: `redact` and `retention`
    (None: the defaults). `run_id` is the Dagster run, `actor` the person or program. `at` is
    UTC in ISO 8601; it and `id` are set by the ledger.
    """

    customization: str
    base_revision: str
    base_digest: str
    adapter_digest: str
    report_digest: str
    mlflow_version: str
    run_id: str
    actor: str
    reason: str
    max_new_tokens: int = 256
    max_prompt_tokens: int | None = None
    action: Action = "release"
    at: str = ""
    id: int = 0
    engine: EngineName | None = None
    traffic_policy: dict[str, Any] | None = None


class ReleaseTransaction:
    """Holds the ledger's write lock; what is recorded becomes visible when the `with` block ends well."""

    def __init__(self, connection: sa.Connection, customization: str, run_id: str):
        self._connection = connection
        self.customization = customization
        self.run_id = run_id

    def current(self) -> Release | None:
        """What serves now, as `Ledger.current`, and nobody can change it until the block ends."""
        return _current(self._connection, self.customization)

    def record(self, release: Release) -> Release:
        """Append a row; returns it with `id` and `at`. Raises ValueError when it is about another
        customization or run than the transaction."""
        for field in ("customization", "run_id"):
            given, expected = getattr(release, field), getattr(self, field)
            if given != expected:
                raise ValueError(f"release.{field} is {given!r}, this transaction is for {expected!r}")
        release = dataclasses.replace(release, at=now())
        row = dataclasses.asdict(release)
        del row["id"]
        inserted = self._connection.execute(sa.insert(_releases).values(row)).inserted_primary_key
        assert inserted is not None
        return dataclasses.replace(release, id=inserted[0])


class Ledger:
    """Opens, and at first use creates, the ledger at a SQLAlchemy URL. Safe to share between threads."""

    def __init__(self, url: str):
        self.engine = open_engine(url)
        _create_schema(self.engine)

    def close(self) -> None:
        self.engine.dispose()

    def current(self, customization: str) -> Release | None:
        """What serves `customization` now; None before its first release and after a withdrawal."""
        with self.engine.connect() as connection:
            return _current(connection, customization)

    def current_all(self) -> dict[str, Release]:
        """What serves now, by customization."""
        return {name: row for name, row in self.newest_all().items() if row.action != "withdraw"}

    def newest_all(self) -> dict[str, Release]:
        """The newest row of each customization, also where it is a withdrawal."""
        latest = sa.select(sa.func.max(_releases.c.id)).group_by(_releases.c.customization)
        with self.engine.connect() as connection:
            rows = connection.execute(sa.select(_releases).where(_releases.c.id.in_(latest)))
            releases = [_release(row) for row in rows.mappings()]
        return {release.customization: release for release in releases}

    def last_in_family(self, family: str) -> dict[str, str]:
        """{customization: the base revision of this family that it served on last}."""
        latest = (
            sa.select(sa.func.max(_releases.c.id))
            .where(
                _releases.c.base_revision.startswith(f"{family}@", autoescape=True),
                _releases.c.action != "withdraw",
            )
            .group_by(_releases.c.customization)
        )
        columns = (_releases.c.customization, _releases.c.base_revision)
        with self.engine.connect() as connection:
            rows = connection.execute(sa.select(*columns).where(_releases.c.id.in_(latest)))
            return {row[0]: row[1] for row in rows}

    def history(self, customization: str, limit: int | None = None) -> list[Release]:
        """All rows of a customization, newest first."""
        query = _of(customization).limit(limit)
        with self.engine.connect() as connection:
            return [_release(row) for row in connection.execute(query).mappings()]

    def fence(self, run_id: str, reason: str) -> None:
        """From now on `run_id` can release nothing. Waits for a release under way; fencing a run again keeps
        the first reason."""
        with self.engine.begin() as connection:
            _take_turn(connection)
            if _fence(connection, run_id) is None:
                row = {"run_id": run_id, "reason": reason, "at": now()}
                connection.execute(sa.insert(_fenced_runs).values(row))

    def is_fenced(self, run_id: str) -> bool:
        with self.engine.connect() as connection:
            return _fence(connection, run_id) is not None

    def owner(self, deployment: str, place: str) -> tuple[str, str]:
        """(deployment, where it was) that the ledger belongs to: the first one that asked."""
        ensure_tables(self.engine, _ownership)
        with self.engine.begin() as connection:
            _take_turn(connection)
            found = connection.execute(sa.select(_owner.c.deployment, _owner.c.place)).first()
            if found is None:
                row = {"id": 1, "deployment": deployment, "place": place, "at": now()}
                connection.execute(sa.insert(_owner).values(row))
                return deployment, place
            return found[0], found[1]

    @contextlib.contextmanager
    def release_transaction(self, customization: str, run_id: str) -> Iterator[ReleaseTransaction]:
        """The only way to append. Raises Fenced when the run is fenced; an exception in the block discards
        what was recorded in it. Releases and fences wait for one another."""
        with self.engine.begin() as connection:
            _take_turn(connection)
            reason = _fence(connection, run_id)
            if reason is not None:
                raise Fenced(f"run {run_id} may not release {customization!r} any more: {reason}")
            yield ReleaseTransaction(connection, customization, run_id)


def ensure_tables(engine: sa.Engine, metadata: sa.MetaData) -> None:
    """Create the tables of another part of the project in the ledger's database; all at once, by whichever
    process comes first."""

    def missing() -> bool:
        return not set(metadata.tables) <= set(sa.inspect(engine).get_table_names())

    def create() -> None:
        if missing():
            with engine.begin() as connection:
                metadata.create_all(connection)

    if not missing():
        return
    if engine.dialect.name == "sqlite":
        with FileLock(f"{engine.url.database}.lock"):
            create()
    else:
        _retry_once(create)


def now() -> str:
    """UTC in ISO 8601 with microseconds, so that text order is time order."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


# -- below the surface ---------------------------------------------------------------------------------


def _of(customization: str) -> sa.Select[Any]:
    chosen = _releases.c.customization == customization
    return sa.select(_releases).where(chosen).order_by(_releases.c.id.desc())


def _current(connection: sa.Connection, customization: str) -> Release | None:
    row = connection.execute(_of(customization).limit(1)).mappings().first()
    return None if row is None or row["action"] == "withdraw" else _release(row)


def _release(row: sa.RowMapping) -> Release:
    return Release(**row)


def _fence(connection: sa.Connection, run_id: str) -> str | None:
    query = sa.select(_fenced_runs.c.reason).where(_fenced_runs.c.run_id == run_id)
    return connection.execute(query).scalar()


def _take_turn(connection: sa.Connection) -> None:
    connection.execute(sa.update(_writer).where(_writer.c.id == 1).values(turn=_writer.c.turn + 1))


def _create_schema(engine: sa.Engine) -> None:
    if engine.dialect.name == "sqlite":
        assert engine.url.database is not None
        # the switch to WAL and the first CREATE TABLE fail when several processes do them at once
        with FileLock(f"{engine.url.database}.lock"):
            if not sa.inspect(engine).has_table(_writer.name):
                write_ahead(engine)
                _create(engine)
            _add_columns(engine)
    else:
        if not sa.inspect(engine).has_table(_writer.name):
            _retry_once(lambda: _create(engine))
        _retry_once(lambda: _add_columns(engine))


def _create(engine: sa.Engine) -> None:
    # one transaction: either the whole schema with its writer row exists, or none of it
    with engine.begin() as connection:
        _metadata.create_all(connection)
        if connection.execute(sa.select(_writer.c.id)).first() is None:
            connection.execute(sa.insert(_writer).values(id=1, turn=0))


def _add_columns(engine: sa.Engine) -> None:
    found = sa.inspect(engine)
    names = {table: {c["name"] for c in found.get_columns(table)} for table in ("releases", "api_keys")}
    for column in _ADDED:
        if column.name not in names[column.table.name]:
            kind = column.type.compile(engine.dialect)
            with engine.begin() as connection:
                connection.execute(sa.DDL(f"ALTER TABLE {column.table.name} ADD COLUMN {column.name} {kind}"))


def _retry_once(create: Callable[[], None]) -> None:
    try:
        create()
    except DBAPIError:  # another process created it at the same time
        create()
