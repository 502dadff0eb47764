"""The ledger on PostgreSQL: what test_ledger.py says of SQLite, where it does not depend on it."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
import test_ledger
from postgres import fresh_database, private_postgres
from test_ledger import make_release, put

from ml_assets.endpoints.gateway import keys
from ml_assets.endpoints.ledger import Ledger

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with private_postgres() as url:
        yield url


@pytest.fixture
def url(cluster: str, tmp_path: Path) -> str:
    return fresh_database(cluster, tmp_path.name)


@pytest.mark.parametrize(
    "same",
    [
        test_ledger.test_current_and_history,
        test_ledger.test_a_fenced_run_cannot_move_an_alias,
        test_ledger.test_a_fence_waits_for_a_release_under_way,
        test_ledger.test_a_failed_block_records_nothing,
        test_ledger.test_a_release_of_another_run_or_customization_is_refused,
    ],
)
def test_as_on_sqlite(same: Callable[[Ledger], None], url: str) -> None:
    ledger = Ledger(url)
    same(ledger)
    ledger.close()


def test_keys_and_policies(url: str) -> None:
    ledger = Ledger(url)
    key, info = keys.create(ledger, ["home"], unlogged=True)
    assert keys.authenticate(ledger, key) == info and info.unlogged
    policy = {"redact": ["email"], "retention": "7d"}
    put(ledger, make_release(traffic_policy=policy))
    assert ledger.newest_all()["home"].traffic_policy == policy
    ledger.close()


def test_several_open_a_fresh_one_at_once(url: str) -> None:
    def open_and_write(n: int) -> None:
        ledger = Ledger(url)
        put(ledger, make_release(f"customization_{n % 2}"))
        ledger.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(open_and_write, range(4)))
    ledger = Ledger(url)
    assert [len(ledger.history(f"customization_{n}")) for n in range(2)] == [2, 2]
    with ledger.engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE releases DROP COLUMN traffic_policy"))
    ledger.close()
    again = Ledger(url)
    assert all(release.traffic_policy is None for release in again.current_all().values())
    again.close()
