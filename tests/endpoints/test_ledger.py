"""The ledger: current and history, the fence, and many processes at once."""

import dataclasses
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from ml_assets.endpoints.ledger import Fenced, Ledger, Release

ROOT = Path(__file__).parents[2]


def make_release(customization: str = "home", adapter: str = "a" * 64, **values: object) -> Release:
    fields = {
        "customization": customization,
        "base_revision": "tiny@0123456789ab",
        "base_digest": "b" * 64,
        "adapter_digest": adapter,
        "report_digest": "c" * 64,
        "mlflow_version": "1",
        "run_id": "run",
        "actor": "test",
        "reason": "first",
    }
    return Release(**(fields | values))  # type: ignore[arg-type]


def put(ledger: Ledger, release: Release) -> Release:
    with ledger.release_transaction(release.customization, release.run_id) as tx:
        return tx.record(release)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(f"sqlite:///{tmp_path}/new/folder/ledger.db")


def test_current_and_history(ledger: Ledger) -> None:
    assert ledger.current("home") is None
    first = put(ledger, make_release(max_prompt_tokens=100))
    second = put(ledger, make_release(adapter="d" * 64, run_id="run2"))
    other = put(ledger, make_release("other"))
    assert first.at < second.at
    assert ledger.current("home") == second
    assert ledger.current_all() == {"home": second, "other": other}
    assert ledger.history("home") == [second, first]
    assert ledger.history("home", limit=1) == [second]
    put(ledger, dataclasses.replace(second, action="withdraw"))
    assert ledger.current("home") is None
    assert ledger.current_all() == {"other": other}


def test_rows_cannot_be_changed_or_deleted(ledger: Ledger) -> None:
    put(ledger, make_release())
    for statement in ("UPDATE releases SET adapter_digest = 'x'", "DELETE FROM releases"):
        with pytest.raises(sa.exc.IntegrityError, match="append-only"), ledger.engine.begin() as connection:
            connection.exec_driver_sql(statement)
    assert len(ledger.history("home")) == 1


def test_a_fenced_run_cannot_move_an_alias(ledger: Ledger) -> None:
    moved: list[str] = []
    ledger.fence("late", "its worker is gone")
    ledger.fence("late", "again")
    refusal = r"run late .*'home'.*its worker is gone"
    with pytest.raises(Fenced, match=refusal), ledger.release_transaction("home", "late"):
        moved.append("late")
    assert not moved
    assert ledger.is_fenced("late") and not ledger.is_fenced("run")
    put(ledger, make_release())


def test_a_fence_waits_for_a_release_under_way(ledger: Ledger) -> None:
    events: list[str] = []

    def fence() -> None:
        ledger.fence("run", "too late")
        events.append("fenced")

    thread = threading.Thread(target=fence)
    with ledger.release_transaction("home", "run") as tx:
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        tx.record(make_release())
        events.append("recorded")
    thread.join(30)
    assert events == ["recorded", "fenced"]
    assert ledger.current("home") is not None
    with pytest.raises(Fenced):
        put(ledger, make_release())


def test_a_failed_block_records_nothing(ledger: Ledger) -> None:
    with pytest.raises(RuntimeError, match="alias"), ledger.release_transaction("home", "run") as tx:
        tx.record(make_release())
        assert tx.current() is not None
        raise RuntimeError("the alias cannot be moved")
    assert ledger.current("home") is None


def test_a_release_of_another_run_or_customization_is_refused(ledger: Ledger) -> None:
    with ledger.release_transaction("home", "run") as tx:
        with pytest.raises(ValueError, match=r"customization is 'other'.*'home'"):
            tx.record(make_release("other"))
        with pytest.raises(ValueError, match="run_id is 'x'"):
            tx.record(make_release(run_id="x"))


def test_memory_databases_are_refused() -> None:
    with pytest.raises(ValueError, match="other processes"):
        Ledger("sqlite://")


WRITER = """
import sys
from ml_assets.endpoints.ledger import Ledger
from tests_ledger_helper import make_release, put
sys.stdin.readline()
ledger = Ledger(sys.argv[1])
for n in range(20):
    put(ledger, make_release(sys.argv[2], adapter=f"{n:064d}"))
"""


def test_eight_processes_open_a_fresh_ledger_at_once_and_write(tmp_path: Path) -> None:
    helper = "import importlib.util as u; s = u.spec_from_file_location('h', {!r}); m = u.module_from_spec(s)"
    (tmp_path / "tests_ledger_helper.py").write_text(
        f"{helper.format(__file__)}\ns.loader.exec_module(m)\nmake_release, put = m.make_release, m.put\n"
    )
    url = f"sqlite:///{tmp_path}/ledger.db"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, url, f"customization_{n % 4}"],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        )
        for n in range(8)
    ]
    for process in processes:  # all are past their imports or nearly so, then start together
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, errors
    ledger = Ledger(url)
    for n in range(4):
        assert len(ledger.history(f"customization_{n}")) == 40
    with ledger.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


def test_a_ledger_from_before_there_were_engines_is_opened(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db"
    old = Ledger(url)
    first = put(old, make_release())
    with old.engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE releases DROP COLUMN engine"))
    old.close()
    again = Ledger(url)
    assert again.current("home") == first
    second = put(again, make_release(engine="vllm"))
    assert again.history("home") == [second, first]
    assert Ledger(url).current_all()["home"].engine == "vllm"
