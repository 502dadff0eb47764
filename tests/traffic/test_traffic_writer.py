"""The writer beside the gateway: batches, redaction, retention, a database that is away, a full queue."""

import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from postgres import private_postgres
from traffic_records import record

from ml_assets.datasets.redaction import RedactionUnavailable
from ml_assets.traffic import writer as writer_module
from ml_assets.traffic.store import TrafficLog
from ml_assets.traffic.writer import (
    CUT,
    LONGEST_SECRET,
    MAX_TEXT,
    Busy,
    Policy,
    TrafficWriter,
    Unavailable,
    UnknownRequest,
)


class Running:
    """A writer, what it counted, and its database."""

    def __init__(self, folder: Path, **options: int | float):
        self.path = folder / "traffic.db"
        self.counts: Counter[tuple[str, str]] = Counter()
        self.writer = TrafficWriter(f"sqlite:///{self.path}", counted=self._count, **options)  # type: ignore[arg-type]
        self.writer.start()

    def _count(self, customization: str, outcome: str, n: int) -> None:
        self.counts[customization, outcome] += n

    def read(self) -> TrafficLog:
        return TrafficLog(f"sqlite:///{self.path}")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def one(**options: int | float) -> Running:
        started.append(Running(tmp_path, **options))
        return started[-1]

    yield one
    for running in started:
        running.writer.close()


def eventually(holds: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_records_are_stored_within_the_bound(start: Callable[..., Running]) -> None:
    running = start(seconds=0.05)
    log = running.read()
    began = time.monotonic()
    running.writer.put(record())
    running.writer.put(record("news"))
    running.writer.put_unlogged("home")
    eventually(lambda: log.heads().keys() == {"home", "news"} and log.heads()["home"].unlogged == 1)
    assert time.monotonic() - began < 5
    assert running.counts == {("home", "stored"): 1, ("news", "stored"): 1, ("home", "unlogged"): 1}


def test_nothing_that_was_put_is_lost_at_the_end(start: Callable[..., Running]) -> None:
    running = start(seconds=10, rows=16)
    asked = [record() for _ in range(100)]
    for one in asked:
        running.writer.put(one)
    running.writer.close()
    assert [r.id for r in running.read().requests("home")] == [r.id for r in asked]


def test_a_full_batch_does_not_wait(start: Callable[..., Running]) -> None:
    running = start(seconds=60, rows=8)
    for _ in range(8):
        running.writer.put(record())
    eventually(lambda: running.counts["home", "stored"] == 8)


def test_flush(start: Callable[..., Running]) -> None:
    running = start(seconds=60)
    for _ in range(3):
        running.writer.put(record())
    assert running.writer.flush()
    assert len(running.read().requests("home")) == 3
    assert running.writer.flush(), "nothing waits"


def test_texts_are_redacted_before_they_are_stored(start: Callable[..., Running]) -> None:
    running = start()
    running.writer.set_policy("home", Policy.of({"redact": ["email"], "retention": "90d"}))
    running.writer.set_policy("open", Policy.of({"redact": [], "retention": "90d"}))
    secret = {
        "asked": "mail a@b.com or 030 1234567",
        "answer": "sent to a@b.com\0",
        "metadata": {"to": "a@b.com"},
    }
    for name in ("home", "open", "unknown"):
        running.writer.put(record(name, **secret))
    assert running.writer.flush()
    log = running.read()
    (mine,), (open_,), (unknown,) = (log.requests(name) for name in ("home", "open", "unknown"))
    assert mine.messages[0]["content"] == "mail [EMAIL] or 030 1234567"
    assert (mine.answer, mine.metadata) == ("sent to [EMAIL]\ufffd", {"to": "[EMAIL]"})
    assert "a@b.com" in open_.messages[0]["content"]
    assert unknown.messages[0]["content"] == "mail [EMAIL] or [PHONE]", "the default where nothing is known"
    said = running.writer.give_feedback(mine.id, mine.key_id, None, "to c@d.com").result(20)
    assert said.right_answer == "to [EMAIL]"


@pytest.mark.parametrize(
    "recorded", [None, {}, {"redact": "nonsense", "retention": "90d"}, {"redact": []}, {"retention": "x"}]
)
def test_a_policy_that_is_not_known_is_the_default(recorded: dict[str, object] | None) -> None:
    assert Policy.of(recorded) == Policy()
    assert "email" in Policy().redact


def test_without_its_redaction_nothing_is_stored(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(_: object) -> None:
        raise RedactionUnavailable("presidio is not installed")

    monkeypatch.setattr(writer_module, "redactor", missing)
    running = start()
    for _ in range(3):
        running.writer.put(record())
    assert running.writer.flush()
    assert running.counts == {("home", "refused"): 3}
    assert running.read().requests("home") == []
    assert caplog.text.count("presidio is not installed") == 1, "not a line for each"


def test_long_texts_are_cut(start: Callable[..., Running]) -> None:
    running = start()
    running.writer.put(record(asked="a" * (MAX_TEXT + 1), answer="b" * MAX_TEXT))
    # an address that the cut divides
    running.writer.put(record(asked="x " * (MAX_TEXT // 2 - 3) + "someone@example.com and more"))
    assert running.writer.flush()
    first, second = running.read().requests("home")
    assert first.messages[0]["content"].endswith(CUT) and len(first.messages[0]["content"]) < MAX_TEXT
    assert first.answer == "b" * MAX_TEXT
    assert "someone" not in second.messages[0]["content"]


@pytest.mark.parametrize("begin", ["", "a@example.com, " * 2000])
@pytest.mark.parametrize("whole", [True, False])
def test_no_part_of_a_secret_that_the_cut_divides_is_stored(
    start: Callable[..., Running], begin: str, whole: bool
) -> None:
    body = "MIIJKAIBAAKCAgEA4f5wg5l2hKsTeNem" * 100
    secrets = [f"-----BEGIN RSA PRIVATE KEY-----\n{body}\n" + "-----END RSA PRIVATE KEY-----" * whole]
    secrets.append(f"eyJhbGciOiJSUzI1NiJ9.{body}.{body}")
    running = start()
    for secret in secrets:
        for cut in (MAX_TEXT, MAX_TEXT + LONGEST_SECRET):
            for inside in (50, 1500, 3000):
                before = begin + "x " * ((cut - inside - len(begin)) // 2)
                running.writer.put(record(asked=f"{before}{secret}{' and more' * 5000 * whole}"))
    assert running.writer.flush()
    texts = [found.messages[0]["content"] for found in running.read().requests("home")]
    assert len(texts) == 12
    assert not any("MII" in text for text in texts)
    assert max(map(len, texts)) <= MAX_TEXT


def test_odd_characters_are_stored(start: Callable[..., Running]) -> None:
    running = start()
    running.writer.put(record(asked="\ud800 \0 \U0010ffff", answer="\udfff", metadata={"\0": "\ud800"}))
    assert running.writer.flush()
    (found,) = running.read().requests("home")
    assert found.messages[0]["content"] == "? \ufffd \U0010ffff"


def test_while_the_database_is_away_records_wait_and_the_oldest_go(
    start: Callable[..., Running],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(writer_module, "RETRY_SECONDS", 0.05)
    (tmp_path / "traffic.db").mkdir()  # can't be opened
    running = start(bound=50, rows=10, seconds=0.01)
    asked = [record() for _ in range(80)]
    running.writer.put(asked[0])
    eventually(lambda: "the database is away" in caplog.text)
    for one in asked[1:]:
        running.writer.put(one)
    eventually(lambda: running.counts["home", "dropped"] == 30)
    with pytest.raises(Unavailable):
        running.writer.give_feedback(asked[-1].id, "0000000a", 1, None).result(20)
    (tmp_path / "traffic.db").rmdir()
    assert running.writer.flush()
    stored = [r.id for r in running.read().requests("home")]
    assert stored == [r.id for r in asked[30:]]
    assert running.counts == {("home", "dropped"): 30, ("home", "stored"): 50}
    assert "the database answers again" in caplog.text
    assert "records dropped" in caplog.text


def test_put_never_waits_for_the_database(start: Callable[..., Running]) -> None:
    running = start(seconds=0.01)
    log = running.read()
    holder = sqlite3.connect(running.path, isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN IMMEDIATE")
    times = []
    for _ in range(2000):
        one = record()
        began = time.perf_counter()
        running.writer.put(one)
        times.append(time.perf_counter() - began)
    holder.execute("ROLLBACK")
    holder.close()
    assert sorted(times)[1980] < 0.001
    assert running.writer.flush()
    assert log.heads()["home"].requests == 2000


def test_a_record_that_no_database_takes_does_not_hold_up_the_others(start: Callable[..., Running]) -> None:
    running = start(seconds=0.2)
    good = [record(), record()]
    running.writer.put(good[0])
    running.writer.put(record(latency_ms="not a number"))  # type: ignore[arg-type]
    running.writer.put(record(status={"not": "storable"}))  # type: ignore[arg-type]
    running.writer.put(good[1])
    assert running.writer.flush()
    assert {r.id for r in good} <= {r.id for r in running.read().requests("home")}
    assert running.counts["home", "refused"] >= 1
    running.writer.put(record())
    assert running.writer.flush()


def test_a_retention_longer_than_the_calendar_keeps_all() -> None:
    for retention in ("999999d", f"{10**20}m"):
        since = Policy.of({"redact": [], "retention": retention}).kept_since(datetime.now(UTC))
        assert since < record().at, retention


def test_rows_past_their_retention_go(start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    now = datetime.now(UTC)

    def at(days: float) -> str:
        return (now - timedelta(days=days)).isoformat(timespec="microseconds")

    log = TrafficLog(f"sqlite:///{start().path}")
    log.append([record(name, at=at(days)) for name in ("home", "news") for days in (100, 8, 1)])
    monkeypatch.setattr(writer_module, "PURGE_SECONDS", 0.05)
    running = start()
    running.writer.set_policy("home", Policy.of({"redact": [], "retention": "7d"}))
    eventually(lambda: (len(log.requests("home")), len(log.requests("news"))) == (1, 2))


def test_feedback_is_committed_when_it_is_acknowledged(start: Callable[..., Running]) -> None:
    running = start(seconds=60)
    asked = record()
    running.writer.put(asked)  # it waits in the queue
    said = running.writer.give_feedback(asked.id, asked.key_id, 1, "right").result(20)
    connection = sqlite3.connect(running.path)
    assert connection.execute("SELECT rating, right_answer FROM feedback").fetchall() == [(1, "right")]
    assert said.seq
    for wrong in (("chatcmpl-no", asked.key_id), (asked.id, "0000000b")):
        with pytest.raises(UnknownRequest):
            running.writer.give_feedback(*wrong, 1, None).result(20)


def test_a_flood_of_feedback_is_refused_not_queued_for_ever(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "FEEDBACK_WAITING", 3)
    running = start()
    asked = record()
    running.writer.put(asked)
    assert running.writer.flush()
    go = threading.Event()
    running.writer._feedback.submit(go.wait)
    running.writer._feedback.submit(go.wait)
    futures = [running.writer.give_feedback(asked.id, asked.key_id, 1, None) for _ in range(3)]
    with pytest.raises(Busy):
        running.writer.give_feedback(asked.id, asked.key_id, 1, None)
    go.set()
    assert {future.result(20).rating for future in futures} == {1}
    eventually(lambda: running.writer._feedback_waiting == 0)
    running.writer.give_feedback(asked.id, asked.key_id, -1, None).result(20)


@pytest.mark.slow
def test_postgresql_may_cut_its_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every append is whole or is repeated: nothing is lost, nothing is there twice."""
    monkeypatch.setattr(writer_module, "RETRY_SECONDS", 0.02)
    with private_postgres() as url:
        counts: Counter[str] = Counter()
        writer = TrafficWriter(
            url, seconds=0.001, rows=4, counted=lambda _, outcome, n: counts.update({outcome: n})
        )
        writer.start()
        engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
        asked = [record() for _ in range(400)]
        cut = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        ended = 0
        with engine.connect() as connection:
            for n, one in enumerate(asked):
                writer.put(one)
                if n % 20 == 0:
                    ended += connection.scalar(sa.text(cut + " AND backend_type = 'client backend'")) or 0
                time.sleep(0.002)
        assert writer.flush()
        said = writer.give_feedback(asked[-1].id, asked[-1].key_id, 1, "right").result(20)
        writer.close()
        log = TrafficLog(url)
        assert ended > 0
        assert [r.id for r in log.requests("home")] == [one.id for one in asked]
        assert log.heads()["home"].requests == 400 == counts["stored"]
        assert log.feedback("home")[0].feedback == said
        log.close()
        engine.dispose()


@pytest.mark.slow
def test_a_postgresql_server_that_takes_no_writes_is_away(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also its connections are: after a failover they lead to what is a standby now."""
    monkeypatch.setattr(writer_module, "RETRY_SECONDS", 0.02)
    with private_postgres() as url:
        counts: Counter[str] = Counter()
        options = {"seconds": 0.001, "counted": lambda _, outcome, n: counts.update({outcome: n})}
        admin = sa.create_engine(url, isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:

            def take_writes(value: str) -> None:
                connection.execute(
                    sa.text(f"ALTER DATABASE postgres SET default_transaction_read_only = {value}")
                )

            TrafficLog(url).close()
            take_writes("on")
            writer = TrafficWriter(url, **options)
            writer.start()
            asked = [record(), record()]
            for one in asked:
                writer.put(one)
            eventually(lambda: "the database is away" in caplog.text)
            take_writes("off")
            assert writer.flush() and counts == {"stored": 2}
            take_writes("on")
            assert writer._log is not None
            writer._log.engine.dispose()
            for _ in range(2):
                with pytest.raises(Unavailable, match="read-only"):
                    writer.give_feedback(asked[0].id, asked[0].key_id, 1, None).result(20)
            take_writes("off")
            assert writer.give_feedback(asked[0].id, asked[0].key_id, 1, "a\0b").result(20).seq
        writer.close()
        admin.dispose()
