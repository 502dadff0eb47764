"""The traffic database on SQLite, and on PostgreSQL where it is installed: the same tests."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from postgres import fresh_database, private_postgres
from traffic_records import record

from ml_assets.traffic import store
from ml_assets.traffic.records import OPERATOR, TrafficRecord
from ml_assets.traffic.store import Head, NewerSchema, TrafficLog, UnknownRequest

ROOT = Path(__file__).parents[2]
KINDS = ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with private_postgres() as url:
        yield url


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a database that does not exist, or is empty, yet."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/new/folder/traffic.db"
    return fresh_database(request.getfixturevalue("cluster"), tmp_path.name)


@pytest.fixture
def log(url: str) -> Iterator[TrafficLog]:
    found = TrafficLog(url)
    yield found
    found.close()


def test_what_was_stored_is_read_in_order(log: TrafficLog) -> None:
    assert log.heads() == {} and log.requests("home") == []
    odd = record(
        asked="ü 你 🙂 'quote' \\", metadata={"language": "de"}, first_token_ms=None, mean_logprob=None
    )
    mine, other = [record(), odd, record(status=504, finish_reason=None)], record("news")
    log.append(mine[:2])
    log.append([mine[2], other])
    found = log.requests("home")
    assert [r.id for r in found] == [r.id for r in mine]
    assert all(isinstance(r.seq, int) for r in found)
    assert [TrafficRecord(**(vars(r) | {"seq": None})) for r in found] == mine
    first, second, third = (r.seq or 0 for r in found)
    assert first < second < third
    assert [r.seq for r in log.requests("home", first)] == [second, third]
    assert [r.seq for r in log.requests("home", first, second)] == [second]
    assert [r.seq for r in log.requests("home", limit=1)] == [first]
    assert [r.seq for r in log.newest("home", 2)] == [second, third]
    assert log.request(odd.id) == found[1] and log.request("no") is None
    assert log.heads() == {
        "home": Head("home", third, 3, 0, mine[2].at, 0, 0),
        "news": Head("news", log.requests("news")[0].seq or 0, 1, 0, other.at, 0, 0),
    }


def test_how_often_each_customization_was_asked_lately(log: TrafficLog) -> None:
    assert log.newest_times(3) == {}
    home = [replace(record(), at=f"2026-01-0{day}T00:00:00+00:00") for day in (1, 2, 3, 4)]
    news = [replace(record("news"), at=f"2026-01-0{day}T00:00:00+00:00") for day in (5, 6)]
    log.append([home[0], news[0], *home[1:], news[1]], {"quiet": 7})
    assert log.newest_times(3) == {"home": (3, home[1].at), "news": (2, news[0].at)}
    assert {name: (len(log.newest(name, 3)), log.newest(name, 3)[0].at) for name in ("home", "news")} == (
        log.newest_times(3)
    )


def test_an_append_can_be_repeated(log: TrafficLog) -> None:
    one, two = record(), record()
    log.append([one, one])
    log.append([one, two], {"home": 2, "quiet": 1})
    assert [r.id for r in log.requests("home")] == [one.id, two.id]
    heads = log.heads()
    assert (heads["home"].requests, heads["home"].unlogged) == (2, 2)
    assert heads["quiet"] == Head("quiet", unlogged=1)


def test_a_right_answer_of_the_operator_stays(log: TrafficLog) -> None:
    asked = record()
    log.append([asked])
    log.give_feedback(asked.id, "0000000a", -1, "right")
    label = log.give_feedback(asked.id, OPERATOR, None, "right")
    assert (label.key_id, label.rating, label.right_answer) == (OPERATOR, -1, "right")
    assert log.give_feedback(asked.id, OPERATOR, None, "right") == label, "idempotent"
    said = log.give_feedback(asked.id, "0000000a", 1, "wrong")
    assert (said.key_id, said.rating, said.right_answer) == (OPERATOR, 1, "right")
    assert log.give_feedback(asked.id, OPERATOR, None, "better").right_answer == "better"
    assert [one.feedback.right_answer for one in log.feedback("home")] == ["better"]
    assert log.heads()["home"].labelled == 1
    with pytest.raises(UnknownRequest):
        log.give_feedback("chatcmpl-none", OPERATOR, None, "right")


def test_the_last_feedback_counts(log: TrafficLog) -> None:
    asked = [record(), record(), record("news", key_id="0000000b")]
    log.append(asked)
    down = log.give_feedback(asked[0].id, "0000000a", -1, None)
    same = log.give_feedback(asked[0].id, "0000000a", -1, None)
    assert same == down, "idempotent"
    log.give_feedback(asked[1].id, "0000000a", None, "right")
    assert log.heads()["home"].labelled == 1
    again = log.give_feedback(asked[0].id, "0000000a", 1, "better")
    assert (again.seq or 0) > (down.seq or 0)
    found = log.feedback("home")
    assert [(j.request.id, j.feedback.rating, j.feedback.right_answer) for j in found] == [
        (asked[1].id, None, "right"),
        (asked[0].id, 1, "better"),
    ]
    assert found[1].feedback == again and found[1].request == log.request(asked[0].id)
    assert [j.request.id for j in log.feedback("home", found[0].feedback.seq or 0)] == [asked[0].id]
    assert [j.request.id for j in log.feedback("home", from_seq=found[0].request.seq)] == [asked[1].id]
    head = log.heads()["home"]
    assert (head.labelled, head.last_feedback_seq) == (2, again.seq)
    log.give_feedback(asked[0].id, "0000000a", 1, None)
    assert log.heads()["home"].labelled == 1
    for wrong in ((asked[0].id, "0000000b"), ("chatcmpl-none", "0000000a"), (asked[2].id, "0000000a")):
        with pytest.raises(UnknownRequest):
            log.give_feedback(*wrong, 1, None)
    with pytest.raises(ValueError, match="a rating, a right answer, or both"):
        log.give_feedback(asked[0].id, "0000000a", None, None)
    assert log.feedback("news") == []


def test_new_feedback_is_counted_for_each_customization_from_where_it_was_read(log: TrafficLog) -> None:
    asked = [record("home"), record("news"), record("home"), record("home"), record("quiet")]
    log.append(asked)
    seqs = [log.give_feedback(r.id, r.key_id, 1, None).seq or 0 for r in asked[:4]]
    assert log.count_feedback({}) == {}
    assert log.count_feedback({"home": 0, "news": 0, "quiet": 0, "no": 0}) == {"home": 3, "news": 1}
    assert log.count_feedback({"home": seqs[0], "news": seqs[1]}) == {"home": 2}
    log.give_feedback(asked[0].id, asked[0].key_id, -1, None)
    assert log.count_feedback({"home": seqs[0]}) == {"home": 3}, "what was said anew is new"


def test_purge_takes_the_feedback_along_and_numbers_are_never_given_again(log: TrafficLog) -> None:
    now = datetime.now(UTC)

    def at(days: int) -> str:
        return (now - timedelta(days=days)).isoformat(timespec="microseconds")

    old = [record(at=at(10)) for _ in range(7)]
    new, other = record(at=at(1)), record("news", at=at(10))
    log.append([*old, new, other])
    for one in (old[0], new):
        log.give_feedback(one.id, "0000000a", 1, "text")
    last = log.heads()["home"].last_seq
    assert log.purge("home", at(5), limit=2) == 2
    assert log.purge("home", at(5)) == 5
    assert log.purge("home", at(5)) == 0
    assert [r.id for r in log.requests("home")] == [new.id]
    assert [j.request.id for j in log.feedback("home")] == [new.id]
    assert len(log.requests("news")) == 1
    assert log.heads()["home"].requests == 8, "what was ever stored"
    assert log.purge("home", at(0)) == 1
    log.append([record()])
    assert (log.requests("home")[0].seq or 0) > last
    with log.engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT count(*) FROM feedback")) == 0


def test_a_reader_misses_nothing(log: TrafficLog, url: str) -> None:
    """Readers go on from the last seq they saw, while several writers append."""
    seen: list[int] = []
    done = threading.Event()

    def read() -> None:
        reader, last = TrafficLog(url), False
        while not last:
            last = done.is_set()
            seen.extend(r.seq or 0 for r in reader.requests("home", max(seen, default=0)))
        reader.close()

    def write(_: int) -> None:
        writer = TrafficLog(url)
        for _ in range(10):
            writer.append([record(), record()])
        writer.close()

    reader = threading.Thread(target=read)
    reader.start()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    done.set()
    reader.join(60)
    assert len(seen) == len(set(seen)) == 80 == log.heads()["home"].requests
    assert all(a < b for a, b in pairwise(seen))


def test_several_processes_open_a_fresh_database_at_once(url: str) -> None:
    program = (
        "import sys; from ml_assets.traffic.store import TrafficLog\n"
        "sys.path.insert(0, 'tests'); from traffic_records import record\n"
        "log = TrafficLog(sys.argv[1]); log.append([record(id=sys.argv[2])]); print(len(log.heads()))"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", program, url, str(n)], cwd=ROOT, stderr=subprocess.PIPE)
        for n in range(5)
    ]
    for process in running:
        errors = process.communicate(timeout=120)[1].decode()
        assert process.returncode == 0, errors
    log = TrafficLog(url)
    assert {r.id for r in log.requests("home")} == set("01234")
    log.close()


def test_a_newer_schema_is_refused(log: TrafficLog, url: str) -> None:
    with log.engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(NewerSchema, match=rf"revision 9999, this release knows {store.REVISION}"):
        TrafficLog(url)


def test_the_migrations_make_the_tables_of_this_code(log: TrafficLog) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.config import Config
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    with log.engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, store._metadata) == []
    config = Config()
    config.set_main_option("script_location", str(Path(store.__file__).parent / "migrations"))
    assert ScriptDirectory.from_config(config).get_current_head() == store.REVISION


def test_an_interrupted_migration_leaves_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., object] = sa.Connection.execute

    def fails(self: sa.Connection, statement: object, *args: object, **options: object) -> object:
        if "CREATE TABLE heads" in str(statement):
            raise KeyboardInterrupt
        return real(self, statement, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sa.Connection, "execute", fails)
        with pytest.raises(KeyboardInterrupt):
            TrafficLog(url)
    engine = sa.create_engine(url)
    assert sa.inspect(engine).get_table_names() == []
    engine.dispose()
    log = TrafficLog(url)
    log.append([record()])
    log.close()


def test_a_database_in_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="other processes can open"):
        TrafficLog("sqlite://")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_heads_are_what_is_stored(tmp_path: Path, data: st.DataObject) -> None:
    log = TrafficLog(f"sqlite:///{tmp_path}/{record().id}.db")
    stored: list[TrafficRecord] = []
    for _ in range(data.draw(st.integers(1, 12))):
        if stored and data.draw(st.booleans()):
            one = data.draw(st.sampled_from(stored))
            answer = data.draw(st.sampled_from([None, "x", "y"]))
            log.give_feedback(one.id, one.key_id, data.draw(st.sampled_from([-1, 1])), answer)
        else:
            names = data.draw(st.lists(st.sampled_from(["home", "news"]), max_size=3))
            new = [record(name) for name in names]
            log.append(new)
            stored += new
    for name, head in log.heads().items():
        requests, feedback = log.requests(name), log.feedback(name)
        assert head.requests == len(requests)
        assert head.last_seq == max(r.seq or 0 for r in requests)
        assert head.last_at == max(r.at for r in requests)
        assert head.labelled == sum(j.feedback.right_answer is not None for j in feedback)
        assert head.last_feedback_seq == max((j.feedback.seq or 0 for j in feedback), default=0)
    log.close()
