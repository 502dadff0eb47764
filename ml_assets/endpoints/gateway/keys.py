"""API keys of the gateway: `evg_<8 hex id>_<32 random bytes, base64url>`, shown once, kept as SHA-256.

A key's secret is 256 random bits, so a plain hash is enough at rest (a slow hash protects
guessable passwords).
"""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sa
from filelock import FileLock

from ml_assets.endpoints.ledger import Ledger, api_keys, now
from ml_assets.spec import NAME

MOST_NAME = 200
ADMIN = "admin"
EVERY = "*"
KEY = re.compile(r"evg_([0-9a-f]{8})_[A-Za-z0-9_-]{43}", re.ASCII)
ADMIN_KEY_FILE = "gateway-admin.key"


@dataclass(frozen=True)
class KeyInfo:
    """A key without its secret. `scopes` are customization names, `*` for every customization, and `admin`.
    Times are UTC in ISO 8601. Of the requests of an `unlogged` key nothing but their number is stored."""

    id: str
    name: str
    scopes: tuple[str, ...]
    created_at: str
    expires_at: str | None
    revoked_at: str | None
    unlogged: bool = False

    def may_use(self, customization: str) -> bool:
        return EVERY in self.scopes or (customization in self.scopes and customization != ADMIN)

    @property
    def is_admin(self) -> bool:
        return ADMIN in self.scopes

    @property
    def valid(self) -> bool:
        return self.revoked_at is None and (self.expires_at is None or now() < self.expires_at)


def create(
    ledger: Ledger,
    scopes: Sequence[str],
    *,
    name: str = "",
    expires_at: datetime | None = None,
    unlogged: bool = False,
) -> tuple[str, KeyInfo]:
    """A new key: (the key, to be shown once; what is known about it).

    Raises ValueError for a scope that is no customization name, `*` or `admin`, for no scope, for a name that
    the database can't hold, and for an expiry without time zone or in the past.
    """
    if not scopes:
        raise ValueError("expected at least one scope: a customization name, '*' or 'admin'")
    for scope in scopes:
        if scope != EVERY and not re.fullmatch(NAME, scope):
            raise ValueError(f"scope {scope!r}: expected a customization name, '*' or 'admin'")
    if len(name) > MOST_NAME or "\0" in name:
        raise ValueError(f"name {name[:MOST_NAME]!r}: expected at most {MOST_NAME} characters without NUL")
    if expires_at is not None:
        if expires_at.tzinfo is None:
            raise ValueError(f"expires_at {expires_at}: expected a time zone")
        if expires_at <= datetime.now(UTC):
            raise ValueError(f"expires_at {expires_at}: expected a time in the future")
    key_id = secrets.token_hex(4)
    key = f"evg_{key_id}_{secrets.token_urlsafe(32)}"
    row = {
        "id": key_id,
        "sha256": _hash(key),
        "name": name,
        "scopes": sorted(set(scopes)),
        "created_at": now(),
        "expires_at": expires_at and expires_at.astimezone(UTC).isoformat(timespec="microseconds"),
        "revoked_at": None,
        "unlogged": unlogged,
    }
    with ledger.engine.begin() as connection:
        connection.execute(sa.insert(api_keys).values(row))
    info = find(ledger, key_id)
    assert info is not None
    return key, info


def authenticate(ledger: Ledger, key: str) -> KeyInfo | None:
    """The valid key with exactly this text; None for a malformed, unknown, wrong, expired or revoked one."""
    match = KEY.fullmatch(key)
    key_id = match[1] if match else ""
    with ledger.engine.connect() as connection:
        row = connection.execute(sa.select(api_keys).where(api_keys.c.id == key_id)).mappings().first()
    # compared even when there is no such id, so that the time tells nothing
    right = hmac.compare_digest(_hash(key), row["sha256"] if row else "0" * 64)
    info = _info(row) if row and right else None
    return info if info and info.valid else None


def find(ledger: Ledger, key_id: str) -> KeyInfo | None:
    with ledger.engine.connect() as connection:
        row = connection.execute(sa.select(api_keys).where(api_keys.c.id == key_id)).mappings().first()
    return _info(row) if row else None


def list_keys(ledger: Ledger) -> list[KeyInfo]:
    """All keys, also revoked and expired ones, oldest first."""
    with ledger.engine.connect() as connection:
        rows = connection.execute(sa.select(api_keys).order_by(api_keys.c.created_at)).mappings()
        return [_info(row) for row in rows]


def revoke(ledger: Ledger, key_id: str) -> KeyInfo:
    """End a key, at once. Raises KeyError for an unknown id; revoking again keeps the first time."""
    with ledger.engine.begin() as connection:
        unrevoked = (api_keys.c.id == key_id) & api_keys.c.revoked_at.is_(None)
        connection.execute(sa.update(api_keys).where(unrevoked).values(revoked_at=now()))
    info = find(ledger, key_id)
    if info is None:
        raise KeyError(f"no API key with id {key_id!r}")
    return info


def ensure_admin_key(ledger: Ledger, path: Path) -> str:
    """The key in the file `path` (mode 0600) if it is a valid admin key, else a new one written there. Safe
    when several processes start at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.exists():
            key = path.read_text().strip()
            info = authenticate(ledger, key)
            if info and info.is_admin:
                path.chmod(0o600)
                return key
        key, _ = create(ledger, [ADMIN, EVERY], name="gateway admin")
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.unlink(missing_ok=True)
        # created unreadable for others, not made so afterwards
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{key}\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        return key


def _info(row: sa.RowMapping) -> KeyInfo:
    values = {name: row[name] for name in ("id", "name", "created_at", "expires_at", "revoked_at")}
    return KeyInfo(**values, scopes=tuple(row["scopes"]), unlogged=bool(row["unlogged"]))


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode(errors="replace")).hexdigest()
