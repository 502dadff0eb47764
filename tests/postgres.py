"""A private PostgreSQL cluster from the system's packages, for tests that should hold on both databases."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa


@contextlib.contextmanager
def private_postgres() -> Iterator[str]:
    """The SQLAlchemy URL of an empty cluster that lives as long as the block; skips where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    here = shutil.which("initdb")
    if not found and not here:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    programs = found[-1].parent if found else Path(str(here)).resolve().parent
    as_user: list[str] = []
    directory = Path(tempfile.mkdtemp(prefix="evergreen-pg-", dir="/tmp"))  # sockets have short paths
    try:
        if os.geteuid() == 0:  # it refuses to run as root
            user = pwd.getpwnam("postgres")
            os.chown(directory, user.pw_uid, user.pw_gid)
            as_user = ["runuser", "-u", "postgres", "--"]
        data = directory / "data"
        initdb = [str(programs / "initdb"), "-D", str(data), "-A", "trust", "-U", "evergreen"]
        encoding = ["-E", "UTF8", "--locale=C", "--no-sync"]
        run = [*as_user, *initdb, *encoding]
        subprocess.run(run, check=True, stdout=subprocess.DEVNULL, cwd="/tmp", timeout=120)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={directory}"]
        command = [*as_user, str(programs / "postgres"), "-D", str(data), "-p", str(port), *options]
        with (directory / "log").open("wb") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, cwd="/tmp")
        try:
            url = f"postgresql+psycopg://evergreen@127.0.0.1:{port}/postgres"
            _wait(url, server, directory / "log")
            yield url
        finally:
            server.terminate()  # runuser passes it on
            server.wait(30)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def fresh_database(url: str, name: str) -> str:
    """The URL of a new, empty database in the same cluster."""
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f'CREATE DATABASE "{name}"'))
    engine.dispose()
    return sa.make_url(url).set(database=name).render_as_string(hide_password=False)


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    engine = sa.create_engine(url)
    deadline = time.monotonic() + 60
    while True:
        try:
            engine.connect().close()
            break
        except sa.exc.OperationalError:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
    engine.dispose()
