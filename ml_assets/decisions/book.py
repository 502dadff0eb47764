"""Decisions, their costs and who may act now: tables in the ledger's database.

Decisions, what happened to them (`decision_steps`), costs and alerts are append-only. `claims` holds at most
one row for each customization: whoever inserts it may act, until the run of its decision has ended. `notes`
holds the newest facts that assets wrote down, so that a sensor needs one query for the fleet.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event

from ml_assets.adapters.rungs import Climb
from ml_assets.artifacts import canonical_json, sha256_bytes
from ml_assets.decisions.records import (
    FINAL,
    NOTHING,
    TRAINING,
    Action,
    Alert,
    Claim,
    Cost,
    Decision,
    Limits,
    Note,
    Rejected,
    Spent,
    Step,
    StepRow,
)
from ml_assets.endpoints.ledger import Ledger, ensure_tables, now

_metadata = sa.MetaData()

_decisions = sa.Table(
    "decisions",
    _metadata,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(16), nullable=False, unique=True),
    sa.Column("customization", sa.String(200), nullable=False, index=True),
    sa.Column("action", sa.String(30), nullable=False),
    sa.Column("status", sa.String(30), nullable=False),
    sa.Column("evidence", sa.String(200), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("device_seconds", sa.Float, nullable=True),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("at", sa.String(40), nullable=False),
)
_steps = sa.Table(
    "decision_steps",
    _metadata,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("decision_id", sa.String(16), nullable=False, index=True),
    sa.Column("step", sa.String(30), nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
    sa.Column("run_id", sa.String(100), nullable=False),
    sa.Column("at", sa.String(40), nullable=False),
    sa.UniqueConstraint("decision_id", "step"),
)
_claims = sa.Table(
    "claims",
    _metadata,
    sa.Column("customization", sa.String(200), primary_key=True),
    sa.Column("decision_id", sa.String(16), nullable=False, unique=True),
    sa.Column("at", sa.String(40), nullable=False),
)
_costs = sa.Table(
    "costs",
    _metadata,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("customization", sa.String(200), nullable=False, index=True),
    sa.Column("kind", sa.String(20), nullable=False),
    sa.Column("partition", sa.String(200), nullable=False),
    sa.Column("run_id", sa.String(100), nullable=False),
    sa.Column("device_seconds", sa.Float, nullable=False),
    sa.Column("money", sa.Float, nullable=False),
    sa.Column("rows", sa.Integer, nullable=False),
    sa.Column("decision_id", sa.String(16), nullable=True, index=True),
    sa.Column("at", sa.String(40), nullable=False, index=True),
    sa.UniqueConstraint("run_id", "customization", "kind", "partition"),
)
_climbs = sa.Table(
    "climbs",
    _metadata,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("climb", sa.String(64), nullable=False, unique=True),
    sa.Column("customization", sa.String(200), nullable=False, index=True),
    sa.Column("base_revision", sa.String(200), nullable=False, index=True),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("at", sa.String(40), nullable=False),
)
_notes = sa.Table(
    "notes",
    _metadata,
    sa.Column("customization", sa.String(200), primary_key=True),
    sa.Column("subject", sa.String(50), primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
    sa.Column("at", sa.String(40), nullable=False),
)
_alerts = sa.Table(
    "alerts",
    _metadata,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(200), nullable=False, unique=True),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("at", sa.String(40), nullable=False),
)
_delivered = sa.Table(
    "delivered_alerts",
    _metadata,
    sa.Column("alert_id", sa.String(200), primary_key=True),
    sa.Column("at", sa.String(40), nullable=False),
)
# one row, as the ledger's: updating it makes writers wait for one another on any database
_turn = sa.Table(
    "decision_writer",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("turn", sa.Integer, nullable=False),
)


@event.listens_for(_turn, "after_create")
def _first_turn(_table: sa.Table, connection: sa.Connection, **_: Any) -> None:
    connection.execute(sa.insert(_turn).values(id=1, turn=0))


for _table in (_decisions, _steps, _costs, _climbs, _alerts):
    for _change in ("UPDATE", "DELETE"):
        event.listen(
            _table,
            "after_create",
            sa.DDL(
                f"CREATE TRIGGER {_table.name}_no_{_change.lower()} BEFORE {_change} ON {_table.name} "
                f"BEGIN SELECT RAISE(ABORT, '{_table.name} is append-only'); END"
            ).execute_if(dialect="sqlite"),
        )


@dataclasses.dataclass(frozen=True)
class History:
    """A decision and what happened to it."""

    decision: Decision
    steps: tuple[StepRow, ...]
    claimed: bool

    @property
    def end(self) -> StepRow | None:
        """The step that closed it."""
        return next((step for step in self.steps if step.step in FINAL), None)

    @property
    def is_open(self) -> bool:
        """To be done, and not at its end."""
        return self.decision.status == "to_do" and self.end is None

    @property
    def verdict(self) -> str | None:
        """What the gate said about its candidate."""
        return next((step.detail for step in self.steps if step.step == "judged"), None)

    @property
    def state(self) -> str:
        """In a word, for people."""
        if self.decision.status != "to_do":
            return self.decision.status
        return self.end.step if self.end else "under way" if self.claimed else "to do"


class DecisionBook:
    """The tables of decisions in the database of `ledger`, created at first use. Safe to share between
    threads; the ledger is closed by its owner."""

    def __init__(self, ledger: Ledger):
        self._engine = ledger.engine
        ensure_tables(self._engine, _metadata)

    # -- decisions -------------------------------------------------------------------------------------

    def record(self, decision: Decision) -> Decision:
        """Store a decision, once: the same evidence, dataset, policy and attempt give back what was decided
        first."""
        return self.record_all([decision])[0]

    def record_all(self, decisions: Sequence[Decision], alerts: Sequence[Alert] = ()) -> list[Decision]:
        """`record`, for many in one transaction, which raises the alerts about them, too."""
        with self._writing() as connection:
            recorded = [_record(connection, decision) for decision in decisions]
            _raise(connection, alerts)
            return recorded

    def get(self, decision_id: str) -> History | None:
        with self._engine.connect() as connection:
            return next(iter(_histories(connection, _decisions.c.id == decision_id, 1)), None)

    def latest(self, customization: str, limit: int = 1, acted: bool = False) -> list[History]:
        """The newest decisions about a customization, newest first; with `acted` those that led to something
        being done."""
        which = _decisions.c.customization == customization
        if acted:
            which &= _decisions.c.status == "to_do"
        with self._engine.connect() as connection:
            return _histories(connection, which, limit)

    def latest_trainings(self, customizations: Collection[str], limit: int) -> dict[str, list[History]]:
        """{customization: its newest decisions that led to a training, newest first}."""
        found: dict[str, list[History]] = {}
        with self._engine.connect() as connection:
            for some in _chunks(list(customizations)):
                place = sa.func.row_number().over(
                    partition_by=_decisions.c.customization, order_by=_decisions.c.seq.desc()
                )
                ranked = (
                    sa.select(_decisions.c.seq, place.label("place"))
                    .where(
                        _decisions.c.customization.in_(some),
                        _decisions.c.action.in_(TRAINING),
                        _decisions.c.status == "to_do",
                    )
                    .subquery()
                )
                newest = sa.select(ranked.c.seq).where(ranked.c.place <= limit)
                for history in _histories(connection, _decisions.c.seq.in_(newest), None):
                    found.setdefault(history.decision.customization, []).append(history)
        return found

    def latest_all(self) -> dict[str, History]:
        """The newest decision about every customization."""
        newest = sa.select(sa.func.max(_decisions.c.seq)).group_by(_decisions.c.customization)
        with self._engine.connect() as connection:
            found = _histories(connection, _decisions.c.seq.in_(newest), None)
        return {history.decision.customization: history for history in found}

    def known(self, ids: Collection[str]) -> set[str]:
        """Which of these decisions were recorded."""
        found: set[str] = set()
        with self._engine.connect() as connection:
            for some in _chunks(list(ids)):
                query = sa.select(_decisions.c.id).where(_decisions.c.id.in_(some))
                found.update(connection.execute(query).scalars())
        return found

    def migrations(self, revision: str | None = None) -> list[History]:
        """The decisions to migrate, to one base revision or to any, newest first."""
        which = _decisions.c.action == "migrate"
        if revision is not None:  # all of them are about a base revision, which their evidence begins with
            which &= _decisions.c.evidence.startswith(f"base-{revision}-", autoescape=True)
        with self._engine.connect() as connection:
            return _histories(connection, which, None)

    def moved_away(self, revision: str) -> dict[str, str]:
        """{customization: when its newest migration to another revision of the same family was decided}, of
        those that succeeded."""

        def about(what: str) -> sa.ColumnElement[bool]:
            return _decisions.c.evidence.startswith(f"base-{what}", autoescape=True)

        family = revision.rpartition("@")[0]
        query = (
            sa.select(_decisions.c.customization, sa.func.max(_decisions.c.at))
            .join(_steps, _steps.c.decision_id == _decisions.c.id)
            .where(
                _decisions.c.action == "migrate",
                _steps.c.step == "succeeded",
                about(f"{family}@"),
                ~about(f"{revision}-"),
            )
            .group_by(_decisions.c.customization)
        )
        with self._engine.connect() as connection:
            return {row[0]: row[1] for row in connection.execute(query)}

    def open(self) -> list[History]:
        """Everything that is to be done or under way."""
        ended = sa.select(_steps.c.decision_id).where(_steps.c.step.in_(FINAL))
        which = sa.and_(_decisions.c.status == "to_do", _decisions.c.id.not_in(ended))
        with self._engine.connect() as connection:
            return _histories(connection, which, None)

    def start_together(self, ids: Collection[str]) -> str:
        """Write down that these decisions are carried out by one backfill; gives its id (8 hex), which is
        the detail of the step `started` of each."""
        name = sha256_bytes(canonical_json(sorted(ids)))[:8]
        with self._writing() as connection:
            for decision_id in sorted(ids):
                _step(connection, decision_id, "started", name, "")
        return name

    def migrating(self, customization: str, revision: str) -> str | None:
        """The decision under way that migrates a customization to a base revision."""
        with self._engine.connect() as connection:
            return _migrating(connection, customization, revision)

    def pending(self, actions: Collection[Action]) -> list[Decision]:
        """What is to be done and was not begun, oldest first."""
        ended = sa.select(_steps.c.decision_id).where(_steps.c.step.in_(FINAL))
        claimed = sa.select(_claims.c.decision_id)
        query = (
            sa.select(_decisions.c.body, _decisions.c.at)
            .where(
                _decisions.c.status == "to_do",
                _decisions.c.action.in_(actions),
                _decisions.c.id.not_in(ended),
                _decisions.c.id.not_in(claimed),
            )
            .order_by(_decisions.c.seq)
        )
        with self._engine.connect() as connection:
            return [_decision(row) for row in connection.execute(query).mappings()]

    def step(self, decision_id: str, step: Step, detail: str = "", run_id: str = "") -> None:
        """Write down what happened to a decision; each step once. A final step gives the claim back."""
        with self._writing() as connection:
            _step(connection, decision_id, step, detail, run_id)

    def finish(
        self,
        decision: Decision,
        step: Step,
        detail: str,
        run_id: str,
        then: Decision | None = None,
        alerts: Sequence[Alert] = (),
    ) -> None:
        """Close a decision, give its claim back, record what follows from it and raise the alerts, or nothing
        of these."""
        with self._writing() as connection:
            _step(connection, decision.id, step, detail, run_id)
            if then is not None:
                _record(connection, then)
            _raise(connection, alerts)

    # -- claims ----------------------------------------------------------------------------------------

    def claims(self) -> list[Claim]:
        """Everything that is under way, in the order it began."""
        query = (
            sa.select(
                _claims.c.customization, _claims.c.at.label("since"), _decisions.c.body, _decisions.c.at
            )
            .join(_decisions, _decisions.c.id == _claims.c.decision_id)
            .order_by(_claims.c.at)
        )
        with self._engine.connect() as connection:
            rows = connection.execute(query).mappings()
            return [Claim(row["customization"], _decision(row), row["since"]) for row in rows]

    def claim(
        self,
        decision: Decision,
        own: Limits,
        fleet: Limits,
        price: float,
        alert: Callable[[str], Alert] | None = None,
    ) -> str | None:
        """`claim_all` of one decision."""
        told = (lambda _, reason: alert(reason)) if alert else None
        return self.claim_all([decision], lambda _: (own, fleet), price, told)[0]

    def claim_all(
        self,
        wanted: Sequence[Decision],
        limits_of: Callable[[Decision], tuple[Limits, Limits]],
        price: float,
        alert: Callable[[Decision, str], Alert] | None = None,
    ) -> list[str | None]:
        """Take the right to act on the decisions' customizations, in this order. For each None when it is
        ours now, else the reason.

        One transaction: of any number of callers one gets it, and what the open claims are going to spend
        counts as spent, so that together they stay within `limits_of` (of the customization, of the fleet).
        Over a limit, the decision is closed with the step `blocked_by_budget`, and `alert` is raised.
        """
        with self._writing() as connection:
            columns = (_claims.c.customization, _claims.c.decision_id)
            holders = {row[0]: str(row[1]) for row in connection.execute(sa.select(*columns))}
            taken = _spent_by(connection, now()[:7])
            for name, more in _reserved_by(connection, price).items():
                taken[name] = taken.get(name, NOTHING) + more
            total = sum(taken.values(), NOTHING)

            def refused(decision: Decision) -> str | None:
                nonlocal total
                name = decision.customization
                if _ended(connection, decision.id):
                    return "it was closed meanwhile"
                if holder := holders.get(name):
                    return "it has begun" if holder == decision.id else f"decision {holder} is under way"
                if decision.action in TRAINING:
                    seconds, (own, fleet) = decision.device_seconds or 0.0, limits_of(decision)
                    planned = Spent(seconds, seconds * price if decision.cost is None else decision.cost)
                    before = taken.get(name, NOTHING)
                    for whose, limits, spent in (
                        ("of this customization", own, before),
                        ("of the fleet", fleet, total),
                    ):
                        if reason := limits.exceeded_by(spent, planned):
                            reason = f"the budget {whose}: {reason}"
                            _step(connection, decision.id, "blocked_by_budget", reason, "")
                            _raise(connection, [alert(decision, reason)] if alert else [])
                            return reason
                    taken[name], total = before + planned, total + planned
                row = {"customization": name, "decision_id": decision.id, "at": now()}
                connection.execute(sa.insert(_claims).values(row))
                holders[name] = decision.id
                return None

            return [refused(decision) for decision in wanted]

    # -- costs -----------------------------------------------------------------------------------------

    def record_cost(self, cost: Cost) -> None:
        """Store what a run spent on an asset partition; once, however often it is told. A run that carries
        out many decisions names none: then it is the one that migrates the customization to the partition."""
        with self._writing() as connection:
            if cost.decision_id is None:
                decision_id = _migrating(connection, cost.customization, cost.partition)
                cost = dataclasses.replace(cost, decision_id=decision_id)
            known = (
                _costs.c.run_id == cost.run_id,
                _costs.c.customization == cost.customization,
                _costs.c.kind == cost.kind,
                _costs.c.partition == cost.partition,
            )
            if connection.execute(sa.select(_costs.c.seq).where(*known)).first() is None:
                row = dataclasses.asdict(cost) | {"at": now()}
                connection.execute(sa.insert(_costs).values(row))

    def costs(self, customization: str, limit: int = 50) -> list[Cost]:
        """The newest costs of a customization, newest first."""
        query = (
            sa.select(_costs)
            .where(_costs.c.customization == customization)
            .order_by(_costs.c.seq.desc())
            .limit(limit)
        )
        with self._engine.connect() as connection:
            return [_cost(row) for row in connection.execute(query).mappings()]

    def costs_by(self, limit: int = 50) -> dict[str, list[Cost]]:
        """{customization: its newest costs, newest first}."""
        place = sa.func.row_number().over(partition_by=_costs.c.customization, order_by=_costs.c.seq.desc())
        ranked = sa.select(_costs, place.label("place")).subquery()
        query = sa.select(ranked).where(ranked.c.place <= limit).order_by(ranked.c.seq.desc())
        found: dict[str, list[Cost]] = {}
        with self._engine.connect() as connection:
            for row in connection.execute(query).mappings():
                found.setdefault(row["customization"], []).append(_cost(row))
        return found

    def costs_of_month(self, month: str) -> dict[str, dict[str, Spent]]:
        """{customization: {kind: spent}} in a month such as `2026-01` (UTC)."""
        sums = (sa.func.sum(_costs.c.device_seconds), sa.func.sum(_costs.c.money))
        query = (
            sa.select(_costs.c.customization, _costs.c.kind, *sums)
            .where(_in(month))
            .group_by(_costs.c.customization, _costs.c.kind)
        )
        found: dict[str, dict[str, Spent]] = {}
        with self._engine.connect() as connection:
            for customization, kind, seconds, money in connection.execute(query):
                found.setdefault(customization, {})[kind] = Spent(seconds, money)
        return found

    def spent(self, customization: str | None, month: str) -> Spent:
        """What a customization spent in a month, or with None all of them."""
        return _of(self.spent_by(month), customization)

    def spent_by(self, month: str) -> dict[str, Spent]:
        """{customization: what it spent in a month}, of those that spent something."""
        with self._engine.connect() as connection:
            return _spent_by(connection, month)

    def spent_on(self, ids: Collection[str]) -> dict[str, Spent]:
        """{decision: what was spent to carry it out}."""
        sums = (sa.func.sum(_costs.c.device_seconds), sa.func.sum(_costs.c.money))
        found: dict[str, Spent] = {}
        with self._engine.connect() as connection:
            for some in _chunks(list(ids)):
                query = sa.select(_costs.c.decision_id, *sums).where(_costs.c.decision_id.in_(some))
                for name, seconds, money in connection.execute(query.group_by(_costs.c.decision_id)):
                    found[name] = Spent(seconds, money)
        return found

    def reserved(self, customization: str | None, price: float) -> Spent:
        """What the action under way of a customization is going to spend, as it was predicted, or with None
        those of all."""
        return _of(self.reserved_by(price), customization)

    def reserved_by(self, price: float) -> dict[str, Spent]:
        """{customization: what its action under way is going to spend, as it was predicted}."""
        with self._engine.connect() as connection:
            return _reserved_by(connection, price)

    # -- climbs of the port ladder ---------------------------------------------------------------------

    def record_climb(self, climb: Climb) -> None:
        """Store how a customization was carried to a base revision; once for the same inputs."""
        with self._writing() as connection:
            known = sa.select(_climbs.c.seq).where(_climbs.c.climb == climb.climb)
            if connection.execute(known).first() is None:
                climb = dataclasses.replace(climb, at=now())
                names = ("climb", "customization", "base_revision", "at")
                row = {name: getattr(climb, name) for name in names}
                body = json.dumps(dataclasses.asdict(climb))
                connection.execute(sa.insert(_climbs).values(row | {"body": body}))

    def climbs(self, customization: str | None = None) -> list[Climb]:
        """All climbs, of the fleet or of one customization, oldest first."""
        query = sa.select(_climbs.c.body).order_by(_climbs.c.seq)
        if customization is not None:
            query = query.where(_climbs.c.customization == customization)
        with self._engine.connect() as connection:
            return [Climb.from_json(json.loads(body)) for body in connection.execute(query).scalars()]

    # -- notes and alerts ------------------------------------------------------------------------------

    def note(self, customization: str, subject: str, value: dict[str, Any]) -> None:
        """Write down the newest fact about a subject (`source`, `dataset`, `candidate`, `look`)."""
        row = {"value": json.dumps(value), "at": now()}
        which = (_notes.c.customization == customization, _notes.c.subject == subject)
        with self._writing() as connection:
            if not connection.execute(sa.update(_notes).where(*which).values(row)).rowcount:
                key = {"customization": customization, "subject": subject}
                connection.execute(sa.insert(_notes).values(key | row))

    def notes(self, customization: str | None = None) -> dict[str, dict[str, Note]]:
        """{customization: {subject: note}}, of the fleet or of one."""
        query = sa.select(_notes)
        if customization is not None:
            query = query.where(_notes.c.customization == customization)
        found: dict[str, dict[str, Note]] = {}
        with self._engine.connect() as connection:
            for name, subject, value, at in connection.execute(query):
                found.setdefault(name, {})[subject] = Note(json.loads(value), at)
        return found

    def alert(self, *alerts: Alert) -> None:
        """Raise alerts; one that was raised before is not raised again."""
        if not alerts:
            return
        with self._writing() as connection:
            _raise(connection, alerts)

    def unknown_alerts(self, ids: Collection[str]) -> set[str]:
        """Those of the ids that were not raised yet."""
        query = sa.select(_alerts.c.id).where(_alerts.c.id.in_(ids))
        with self._engine.connect() as connection:
            return set(ids) - set(connection.execute(query).scalars())

    def undelivered(self, limit: int = 20) -> list[Alert]:
        """Alerts that nobody got yet, oldest first."""
        done = sa.select(_delivered.c.alert_id)
        query = sa.select(_alerts.c.body).where(_alerts.c.id.not_in(done)).order_by(_alerts.c.seq)
        with self._engine.connect() as connection:
            return [Alert(**json.loads(body)) for body in connection.execute(query.limit(limit)).scalars()]

    def delivered(self, alert_id: str) -> None:
        with self._writing() as connection:
            known = sa.select(_delivered.c.at).where(_delivered.c.alert_id == alert_id)
            if connection.execute(known).first() is None:
                connection.execute(sa.insert(_delivered).values(alert_id=alert_id, at=now()))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        """A transaction that waits for all other writers before it reads, on any database."""
        with self._engine.begin() as connection:
            _take_turn(connection)
            yield connection


# -- below the surface ---------------------------------------------------------------------------------


def _take_turn(connection: sa.Connection) -> None:
    connection.execute(sa.update(_turn).where(_turn.c.id == 1).values(turn=_turn.c.turn + 1))


def _record(connection: sa.Connection, decision: Decision) -> Decision:
    query = sa.select(_decisions.c.body, _decisions.c.at).where(_decisions.c.id == decision.id)
    known = connection.execute(query).mappings().first()
    if known is not None:
        return _decision(known)
    decision = dataclasses.replace(decision, at=now())
    body = dataclasses.asdict(decision)
    columns = ("customization", "action", "status", "evidence", "attempt", "device_seconds", "at")
    row = {name: body[name] for name in columns}
    connection.execute(sa.insert(_decisions).values(row | {"id": decision.id, "body": json.dumps(body)}))
    return decision


def _raise(connection: sa.Connection, alerts: Sequence[Alert]) -> None:
    query = sa.select(_alerts.c.id).where(_alerts.c.id.in_([alert.id for alert in alerts]))
    known = set(connection.execute(query).scalars()) if alerts else set[str]()
    for alert in alerts:
        if alert.id not in known:
            known.add(alert.id)
            alert = dataclasses.replace(alert, at=now())
            body = json.dumps(dataclasses.asdict(alert))
            connection.execute(sa.insert(_alerts).values(id=alert.id, body=body, at=alert.at))


def _migrating(connection: sa.Connection, customization: str, revision: str) -> str | None:
    query = (
        sa.select(_decisions.c.id, _decisions.c.body)
        .join(_claims, _claims.c.decision_id == _decisions.c.id)
        .where(_claims.c.customization == customization, _decisions.c.action == "migrate")
    )
    row = connection.execute(query).first()
    return row[0] if row is not None and json.loads(row[1])["base_revision"] == revision else None


def _of(spent: Mapping[str, Spent], customization: str | None) -> Spent:
    return sum(spent.values(), NOTHING) if customization is None else spent.get(customization, NOTHING)


def _ended(connection: sa.Connection, decision_id: str) -> bool:
    query = sa.select(_steps.c.seq).where(_steps.c.decision_id == decision_id, _steps.c.step.in_(FINAL))
    return connection.execute(query).first() is not None


def _step(connection: sa.Connection, decision_id: str, step: Step, detail: str, run_id: str) -> None:
    same = (_steps.c.decision_id == decision_id, _steps.c.step == step)
    known = connection.execute(sa.select(_steps.c.seq).where(*same)).first()
    if known is None and not (step in FINAL and _ended(connection, decision_id)):
        row = {"decision_id": decision_id, "step": step, "detail": detail, "run_id": run_id, "at": now()}
        connection.execute(sa.insert(_steps).values(row))
    if step in FINAL:
        connection.execute(sa.delete(_claims).where(_claims.c.decision_id == decision_id))


def _histories(connection: sa.Connection, which: Any, limit: int | None) -> list[History]:
    query = sa.select(_decisions).where(which).order_by(_decisions.c.seq.desc()).limit(limit)
    decisions = [(row["id"], _decision(row)) for row in connection.execute(query).mappings()]
    claimed = set(connection.execute(sa.select(_claims.c.decision_id)).scalars())
    steps: dict[str, list[StepRow]] = {}
    for some in _chunks([decision_id for decision_id, _ in decisions]):
        chosen = sa.select(_steps).where(_steps.c.decision_id.in_(some)).order_by(_steps.c.seq)
        for row in connection.execute(chosen).mappings():
            steps.setdefault(row["decision_id"], []).append(
                StepRow(**{field.name: row[field.name] for field in dataclasses.fields(StepRow)})
            )
    return [History(d, tuple(steps.get(name, ())), name in claimed) for name, d in decisions]


def _chunks(ids: list[str], size: int = 500) -> Iterable[list[str]]:
    return (ids[start : start + size] for start in range(0, len(ids), size))


def _decision(row: sa.RowMapping) -> Decision:
    body = json.loads(row["body"])
    rejected = tuple(Rejected(**one) for one in body["rejected"])
    return Decision(**body | {"rejected": rejected, "at": row["at"]})


def _cost(row: sa.RowMapping) -> Cost:
    return Cost(**{field.name: row[field.name] for field in dataclasses.fields(Cost)})


def _in(month: str) -> sa.ColumnElement[bool]:
    return _costs.c.at.startswith(f"{month}-")


def _spent_by(connection: sa.Connection, month: str) -> dict[str, Spent]:
    sums = (sa.func.sum(_costs.c.device_seconds), sa.func.sum(_costs.c.money))
    query = sa.select(_costs.c.customization, *sums).where(_in(month)).group_by(_costs.c.customization)
    return {name: Spent(seconds, money) for name, seconds, money in connection.execute(query)}


def _reserved_by(connection: sa.Connection, price: float) -> dict[str, Spent]:
    """What the open claim of each customization will spend, without what its runs have spent already."""
    used = [
        sa.func.coalesce(sa.func.sum(column), 0.0) for column in (_costs.c.device_seconds, _costs.c.money)
    ]
    query = (
        sa.select(_claims.c.customization, _decisions.c.body, *used)
        .select_from(_claims)
        .join(_decisions, _decisions.c.id == _claims.c.decision_id)
        .outerjoin(_costs, _costs.c.decision_id == _decisions.c.id)
        .group_by(_claims.c.customization, _decisions.c.id, _decisions.c.body)
    )
    found: dict[str, Spent] = {}
    for name, body, seconds, money in map(tuple, connection.execute(query)):
        planned = json.loads(body)
        wanted = planned["device_seconds"] or 0.0
        # what a decision costs counts what a provider is paid
        cost = wanted * price if planned["cost"] is None else planned["cost"]
        found[name] = Spent(max(0.0, wanted - seconds), max(0.0, cost - money))
    return found
