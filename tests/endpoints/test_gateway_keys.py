"""API keys: format, scopes, expiry, revocation, and nothing secret at rest."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from ml_assets.endpoints.gateway import keys
from ml_assets.endpoints.ledger import Ledger, api_keys


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(f"sqlite:///{tmp_path}/ledger.db")


def test_a_key_opens_its_scopes_only(ledger: Ledger) -> None:
    key, info = keys.create(ledger, ["home", "news"], name="shop")
    assert re.fullmatch(r"evg_[0-9a-f]{8}_[A-Za-z0-9_-]{43}", key) and f"evg_{info.id}_" in key
    found = keys.authenticate(ledger, key)
    assert found == info and found.may_use("home") and not found.may_use("other") and not found.is_admin
    every = keys.create(ledger, ["*"])[1]
    assert every.may_use("anything") and not every.is_admin
    admin = keys.create(ledger, ["admin"])[1]
    assert admin.is_admin and not admin.may_use("home") and not admin.may_use("admin")
    assert [k.id for k in keys.list_keys(ledger)] == [info.id, every.id, admin.id]


def test_only_the_hash_is_stored(ledger: Ledger, tmp_path: Path) -> None:
    issued = [keys.create(ledger, ["*"])[0] for _ in range(50)]
    ledger.close()
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for key in issued:
        assert key.encode() not in stored
        assert key.split("_", 2)[2].encode() not in stored


def test_wrong_expired_and_revoked_keys_are_refused(ledger: Ledger) -> None:
    key, info = keys.create(ledger, ["*"])
    flipped = key[:-2] + ("A" if key[-2] != "A" else "B") + key[-1]
    for wrong in ("", "sk-x", key[:-1], key + "A", key.upper(), f" {key}", f"{key}\n", flipped, "evg_é"):
        assert keys.authenticate(ledger, wrong) is None, wrong
    assert keys.authenticate(ledger, key)
    revoked = keys.revoke(ledger, info.id)
    assert revoked.revoked_at and keys.authenticate(ledger, key) is None
    assert keys.revoke(ledger, info.id).revoked_at == revoked.revoked_at
    with pytest.raises(KeyError, match="'00000000'"):
        keys.revoke(ledger, "00000000")

    short, _ = keys.create(ledger, ["*"], expires_at=datetime.now(UTC) + timedelta(hours=1))
    assert keys.authenticate(ledger, short)
    with ledger.engine.begin() as connection:
        past = (datetime.now(UTC) - timedelta(seconds=1)).isoformat(timespec="microseconds")
        connection.execute(sa.update(api_keys).values(expires_at=past))
    assert keys.authenticate(ledger, short) is None


@pytest.mark.parametrize(
    ("scopes", "expires_at", "message"),
    [
        ([], None, "at least one scope"),
        (["Home Commands"], None, "'Home Commands': expected a customization name"),
        (["*"], datetime(2000, 1, 1, tzinfo=UTC), "in the future"),
        (["*"], datetime(2100, 1, 1), "time zone"),
    ],
)
def test_bad_keys_are_not_made(
    ledger: Ledger, scopes: list[str], expires_at: datetime | None, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        keys.create(ledger, scopes, expires_at=expires_at)
    assert keys.list_keys(ledger) == []


@pytest.mark.parametrize("name", ["n" * 201, "a\0b"])
def test_a_name_that_no_database_holds_is_refused(ledger: Ledger, name: str) -> None:
    with pytest.raises(ValueError, match=r"^name .*: expected at most 200 characters without NUL"):
        keys.create(ledger, ["*"], name=name)
    assert keys.list_keys(ledger) == []
    assert keys.create(ledger, ["*"], name="n" * 200)[1].name == "n" * 200


@given(st.text())
def test_any_text_is_only_refused(text: str) -> None:
    assert keys.authenticate(_shared, text) is None


@pytest.fixture(autouse=True, scope="module")
def _shared_ledger(tmp_path_factory: pytest.TempPathFactory) -> None:
    global _shared
    _shared = Ledger(f"sqlite:///{tmp_path_factory.mktemp('keys')}/ledger.db")


_shared: Ledger


def test_the_admin_key_file(ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "home" / keys.ADMIN_KEY_FILE
    key = keys.ensure_admin_key(ledger, path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text() == f"{key}\n"
    assert keys.ensure_admin_key(ledger, path) == key
    info = keys.authenticate(ledger, key)
    assert info and info.is_admin and info.may_use("home")
    keys.revoke(ledger, info.id)
    renewed = keys.ensure_admin_key(ledger, path)
    assert renewed != key and keys.authenticate(ledger, renewed)
    assert path.stat().st_mode & 0o777 == 0o600
