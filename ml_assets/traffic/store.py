"""The traffic database: every request with its answer, and what users said about it.

SQLite in WAL mode by default, PostgreSQL by URL (`postgresql+psycopg://`). The schema is made by the Alembic
migrations beside this file when a database is opened. Writers wait for one another, so that the order of
`seq` is the order in which rows become visible: who has read up to a `seq` has missed nothing before it.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sa
from filelock import FileLock

from ml_assets.databases import WRITES, open_engine, write_ahead
from ml_assets.traffic.records import OPERATOR, FeedbackRecord, Judged, Rating, TrafficRecord

REVISION = "0001"
"""The newest migration. Revisions are numbers of four digits, so that text order is their order."""
PURGE_ROWS = 500
"""Rows that one transaction of `purge` deletes: other writers wait for no longer than that."""
WRITER_LOCK, SCHEMA_LOCK = 0x45566772, 0x45566773
"""PostgreSQL's advisory locks of those who write rows and of those who change the schema."""

_metadata = sa.MetaData()
_SEQ = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_requests = sa.Table(
    "requests",
    _metadata,
    sa.Column("seq", _SEQ, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(64), nullable=False, unique=True),
    sa.Column("at", sa.String(40), nullable=False),
    sa.Column("customization", sa.String(200), nullable=False),
    sa.Column("key_id", sa.String(64), nullable=False),
    sa.Column("adapter_digest", sa.String(64), nullable=False),
    sa.Column("base_revision", sa.String(200), nullable=False),
    sa.Column("messages", sa.JSON, nullable=False),
    sa.Column("answer", sa.Text, nullable=False),
    sa.Column("status", sa.Integer, nullable=False),
    sa.Column("finish_reason", sa.String(20), nullable=True),
    sa.Column("prompt_tokens", sa.Integer, nullable=False),
    sa.Column("completion_tokens", sa.Integer, nullable=False),
    sa.Column("latency_ms", sa.Double, nullable=False),
    sa.Column("first_token_ms", sa.Double, nullable=True),
    sa.Column("mean_logprob", sa.Double, nullable=True),
    sa.Column("metadata", sa.JSON, nullable=False),
    sa.Index("requests_by_customization", "customization", "seq"),
    sa.Index("requests_by_time", "customization", "at"),
    sqlite_autoincrement=True,  # the number of a deleted row is never given again
)
_feedback = sa.Table(
    "feedback",
    _metadata,
    sa.Column("seq", _SEQ, primary_key=True, autoincrement=True),
    sa.Column("request_id", sa.String(64), nullable=False, unique=True),
    sa.Column("at", sa.String(40), nullable=False),
    sa.Column("customization", sa.String(200), nullable=False),
    sa.Column("key_id", sa.String(64), nullable=False),
    sa.Column("rating", sa.Integer, nullable=True),
    sa.Column("right_answer", sa.Text, nullable=True),
    sa.Index("feedback_by_customization", "customization", "seq"),
    sqlite_autoincrement=True,
)
# kept up to date by every writer, so that a look at the whole fleet reads one row for each customization
_heads = sa.Table(
    "heads",
    _metadata,
    sa.Column("customization", sa.String(200), primary_key=True),
    sa.Column("last_seq", _SEQ, nullable=False),
    sa.Column("requests", _SEQ, nullable=False),
    sa.Column("unlogged", _SEQ, nullable=False),
    sa.Column("last_at", sa.String(40), nullable=True),
    sa.Column("last_feedback_seq", _SEQ, nullable=False),
    sa.Column("labelled", _SEQ, nullable=False),
)

# What runs for every few requests is built once: building a statement holds up the gateway's requests for
# longer than the database does.
_STORED = [column.name for column in _requests.c if column.name != "seq"]
_INSERT = sa.insert(_requests)
_KNOWN = sa.select(_requests.c.id).where(_requests.c.id.in_(sa.bindparam("ids", expanding=True)))
_LAST_SEQ = sa.select(sa.func.max(_requests.c.seq)).where(_requests.c.customization == sa.bindparam("of"))
_HEAD = sa.select(_heads).where(_heads.c.customization == sa.bindparam("of"))
_INSERT_HEAD = sa.insert(_heads)
_UPDATE_HEAD = sa.update(_heads).where(_heads.c.customization == sa.bindparam("of"))

_migrating = threading.Lock()  # Alembic keeps what it works on in global variables


class UnknownRequest(LookupError):
    """There is no such request, or it was asked by another key: the message does not tell which."""


class NewerSchema(Exception):
    """The database was opened by a newer release of this project; the message names both revisions."""


@dataclass(frozen=True)
class Head:
    """What is newest of one customization. `requests` and `labelled` (requests with a right answer) count all
    that were ever stored, also those that were purged since; `unlogged` counts the requests of keys that want
    nothing stored. Sequence numbers are 0 and `last_at` is None where there is nothing yet."""

    customization: str
    last_seq: int = 0
    requests: int = 0
    unlogged: int = 0
    last_at: str | None = None
    last_feedback_seq: int = 0
    labelled: int = 0


class TrafficLog:
    """Opens, and at first use creates, the traffic database at a SQLAlchemy URL. Safe to share between
    threads, and to open from several processes at once.

    Raises NewerSchema, ValueError for a database in memory, SQLAlchemy's errors when it is not reachable.
    """

    def __init__(self, url: str):
        self.engine = open_engine(url)
        try:
            _prepare(self.engine)
        except BaseException:
            self.engine.dispose()
            raise

    def close(self) -> None:
        self.engine.dispose()

    # -- writing ---------------------------------------------------------------------------------------

    def append(self, records: Sequence[TrafficRecord], unlogged: Mapping[str, int] | None = None) -> None:
        """Store records in one transaction; `seq` is given in their order. A record whose id is stored
        already is left out, so that an append whose outcome is not known can be repeated.

        `unlogged` is the number of requests by customization that were answered and are not stored.
        """
        unlogged = dict(unlogged or {})
        if not records and not unlogged:
            return
        with self._writing() as connection:
            ids = [record.id for record in records]
            known = set(connection.scalars(_KNOWN, {"ids": ids}))
            new = list({record.id: record for record in records if record.id not in known}.values())
            if new:
                rows = [{name: getattr(record, name) for name in _STORED} for record in new]
                connection.execute(_INSERT, rows)
            for name in sorted({record.customization for record in new} | unlogged.keys()):
                times = [record.at for record in new if record.customization == name]
                head = _head(connection, name)
                last = connection.scalar(_LAST_SEQ, {"of": name}) if times else head.last_seq
                _put_head(
                    connection,
                    dataclasses.replace(
                        head,
                        last_seq=last,
                        requests=head.requests + len(times),
                        unlogged=head.unlogged + unlogged.get(name, 0),
                        last_at=max([*times, head.last_at or ""]) or None,
                    ),
                )

    def give_feedback(
        self, request_id: str, key_id: str, rating: Rating | None, right_answer: str | None
    ) -> FeedbackRecord:
        """Store what the key that asked, or OPERATOR, says about an answer, in place of what was said before;
        committed when this returns. Saying the same again changes nothing. A right answer of the operator
        stays, whatever the key says later, and a rating of the key stays when the operator answers.

        Raises UnknownRequest, ValueError when neither rating nor right answer is given.
        """
        if rating is None and right_answer is None:
            raise ValueError("expected a rating, a right answer, or both")
        with self._writing() as connection:
            asked = sa.select(_requests.c.customization).where(_requests.c.id == request_id)
            if key_id != OPERATOR:
                asked = asked.where(_requests.c.key_id == key_id)
            customization = connection.scalar(asked)
            if customization is None:
                raise UnknownRequest(f"no request {request_id!r} of this key is stored")
            query = sa.select(_feedback).where(_feedback.c.request_id == request_id)
            row = connection.execute(query).mappings().first()
            before = FeedbackRecord(**row) if row else None
            if before and key_id == OPERATOR and rating is None:
                rating = before.rating
            elif before and before.key_id == OPERATOR != key_id:
                key_id, right_answer = OPERATOR, before.right_answer
            said = key_id, rating, right_answer
            if before and (before.key_id, before.rating, before.right_answer) == said:
                return before
            # a new row rather than a changed one: its `seq` tells those who read on that something was said
            connection.execute(sa.delete(_feedback).where(_feedback.c.request_id == request_id))
            values = {
                "request_id": request_id,
                "at": datetime.now(UTC).isoformat(timespec="microseconds"),
                "customization": customization,
                "key_id": key_id,
                "rating": rating,
                "right_answer": right_answer,
            }
            inserted = connection.execute(sa.insert(_feedback).values(values)).inserted_primary_key
            assert inserted is not None
            head = _head(connection, customization)
            more = (right_answer is not None) - (before is not None and before.right_answer is not None)
            changed = dataclasses.replace(
                head, last_feedback_seq=inserted[0], labelled=max(0, head.labelled + more)
            )
            _put_head(connection, changed)
            return FeedbackRecord(**values, seq=inserted[0])

    def purge(self, customization: str, before: str, limit: int | None = None) -> int:
        """Delete the requests of a customization from before a time (UTC in ISO 8601), with what was said
        about them, in small transactions; at most `limit`. Returns how many were deleted."""
        deleted = 0
        while limit is None or deleted < limit:
            rows = PURGE_ROWS if limit is None else min(PURGE_ROWS, limit - deleted)
            with self._writing() as connection:
                old = (
                    sa.select(_requests.c.seq, _requests.c.id)
                    .where(_requests.c.customization == customization, _requests.c.at < before)
                    .limit(rows)
                )
                found = connection.execute(old).all()
                ids = [row.id for row in found]
                connection.execute(sa.delete(_feedback).where(_feedback.c.request_id.in_(ids)))
                connection.execute(sa.delete(_requests).where(_requests.c.seq.in_([r.seq for r in found])))
            deleted += len(found)
            if len(found) < rows:
                break
        return deleted

    # -- reading ---------------------------------------------------------------------------------------

    def requests(
        self,
        customization: str,
        after_seq: int = 0,
        until_seq: int | None = None,
        limit: int | None = None,
    ) -> list[TrafficRecord]:
        """Requests of a customization with `after_seq` < seq <= `until_seq`, by seq; the first `limit`."""
        query = (
            sa.select(_requests)
            .where(_requests.c.customization == customization, _requests.c.seq > after_seq)
            .order_by(_requests.c.seq)
            .limit(limit)
        )
        if until_seq is not None:
            query = query.where(_requests.c.seq <= until_seq)
        with self.engine.connect() as connection:
            return [TrafficRecord(**row) for row in connection.execute(query).mappings()]

    def newest(self, customization: str, limit: int) -> list[TrafficRecord]:
        """The last `limit` requests of a customization, by seq."""
        query = (
            sa.select(_requests)
            .where(_requests.c.customization == customization)
            .order_by(_requests.c.seq.desc())
            .limit(limit)
        )
        with self.engine.connect() as connection:
            rows = connection.execute(query).mappings().all()
        return [TrafficRecord(**row) for row in reversed(rows)]

    def newest_times(self, limit: int) -> dict[str, tuple[int, str]]:
        """How many of its newest `limit` requests each customization has, and when the first of them was
        asked (UTC in ISO 8601), where there are any: one query."""
        column = _requests.c
        of_head = sa.select(column.at).where(column.customization == _heads.c.customization)
        of_head = of_head.correlate(_heads)
        newest = of_head.with_only_columns(column.seq).order_by(column.seq.desc()).limit(limit)
        count = sa.select(sa.func.count()).select_from(newest.subquery()).scalar_subquery()
        # where there are fewer, the first of all
        nth = of_head.order_by(column.seq.desc()).limit(1).offset(limit - 1).scalar_subquery()
        first = sa.func.coalesce(nth, of_head.order_by(column.seq).limit(1).scalar_subquery())
        with self.engine.connect() as connection:
            rows = connection.execute(sa.select(_heads.c.customization, count, first))
            return {name: (number, at) for name, number, at in rows if number}

    def request(self, request_id: str) -> TrafficRecord | None:
        """One request by the id of its response."""
        with self.engine.connect() as connection:
            row = connection.execute(sa.select(_requests).where(_requests.c.id == request_id)).mappings()
            found = row.first()
        return TrafficRecord(**found) if found else None

    def feedback(self, customization: str, after_seq: int = 0, from_seq: int | None = None) -> list[Judged]:
        """Requests of a customization with what was said about each last, where the seq of the feedback is
        larger than `after_seq`, and that of the request at least `from_seq`; by the seq of the feedback."""
        said = [column.label(f"feedback_{column.name}") for column in _feedback.c]
        query = (
            sa.select(_requests, *said)
            .join(_feedback, _feedback.c.request_id == _requests.c.id)
            .where(_feedback.c.customization == customization, _feedback.c.seq > after_seq)
            .order_by(_feedback.c.seq)
        )
        if from_seq is not None:
            query = query.where(_requests.c.seq >= from_seq)
        with self.engine.connect() as connection:
            rows = connection.execute(query).mappings().all()
        return [
            Judged(
                TrafficRecord(**{name: row[name] for name in _requests.c.keys()}),  # noqa: SIM118
                FeedbackRecord(**{column.name: row[f"feedback_{column.name}"] for column in _feedback.c}),
            )
            for row in rows
        ]

    def count_feedback(self, since: Mapping[str, int]) -> dict[str, int]:
        """How many requests of each customization were judged after its sequence number in `since`, where any
        were: one query."""
        if not since:
            return {}
        columns = sa.column("name", sa.String), sa.column("seq", _SEQ)
        given = sa.values(*columns, name="given").data(list(since.items())).cte("given")
        new = sa.and_(_feedback.c.customization == given.c.name, _feedback.c.seq > given.c.seq)
        query = sa.select(_feedback.c.customization, sa.func.count()).join(given, new)
        with self.engine.connect() as connection:
            found = connection.execute(query.group_by(_feedback.c.customization)).all()
        return {row[0]: row[1] for row in found}

    def heads(self) -> dict[str, Head]:
        """What is newest of every customization that has traffic: one query, one row for each."""
        with self.engine.connect() as connection:
            rows = connection.execute(sa.select(_heads)).mappings()
            return {row["customization"]: Head(**row) for row in rows}

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        with self.engine.connect().execution_options(**{WRITES: True}) as connection, connection.begin():
            if connection.dialect.name == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(WRITER_LOCK)))
            yield connection


# -- below the surface ---------------------------------------------------------------------------------


def _head(connection: sa.Connection, customization: str) -> Head:
    row = connection.execute(_HEAD, {"of": customization}).mappings().first()
    return Head(**row) if row else Head(customization)


def _put_head(connection: sa.Connection, head: Head) -> None:
    values = dataclasses.asdict(head)
    if not connection.execute(_UPDATE_HEAD, {"of": head.customization, **values}).rowcount:
        connection.execute(_INSERT_HEAD, values)


def _prepare(engine: sa.Engine) -> None:
    """Bring the schema up to date. Raises NewerSchema."""
    if _revision(engine) == REVISION:
        return
    if engine.dialect.name == "sqlite":
        # the switch to WAL fails when several processes do it at once
        with FileLock(f"{engine.url.database}.lock"):
            if _revision(engine) != REVISION:
                write_ahead(engine)
                _migrate(engine)
    else:
        _migrate(engine)


def _revision(engine: sa.Engine) -> str | None:
    """Of the schema; None before there is one. Raises NewerSchema."""
    with engine.connect() as connection:
        return _revision_of(connection)


def _revision_of(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    found = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
    if found is not None and found > REVISION:
        url = connection.engine.url.render_as_string(hide_password=True)
        raise NewerSchema(
            f"traffic database {url}: its schema has revision {found}, this release knows {REVISION}; "
            "expected the release that made it, or a newer one"
        )
    return found


def _migrate(engine: sa.Engine) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    # one transaction: either the whole schema with its revision exists, or none of it
    connection = engine.connect().execution_options(**{WRITES: True})
    with _migrating, connection, connection.begin():
        if connection.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(SCHEMA_LOCK)))
        if _revision_of(connection) != REVISION:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
