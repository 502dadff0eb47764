"""Who a process is, and whether it still runs."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from ml_assets.cli.launcher import (
    BOOT_ID,
    PID,
    PROCESS_STARTED,
    identity,
    is_alive,
    kill_group,
    process_started,
)


@pytest.fixture
def sleeper():
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_running_process_is_alive(sleeper):
    tags = identity(sleeper.pid)
    assert tags[PID] == str(sleeper.pid)
    assert is_alive(tags)


def test_an_ended_process_is_not_alive_even_before_its_parent_looked(sleeper):
    tags = identity(sleeper.pid)
    sleeper.kill()
    deadline = time.monotonic() + 10
    while is_alive(tags) and time.monotonic() < deadline:  # now a zombie: nobody waited for it
        time.sleep(0.01)
    assert not is_alive(tags)
    sleeper.wait()
    assert process_started(sleeper.pid) is None
    assert not is_alive(tags)


def test_the_same_pid_with_another_start_is_another_process(sleeper):
    tags = identity(sleeper.pid) | {PROCESS_STARTED: "17"}
    assert not is_alive(tags)
    kill_group(tags)
    assert sleeper.poll() is None, "a stranger that got the pid must not be killed"


def test_no_process_of_another_boot_is_alive(sleeper):
    assert not is_alive(identity(sleeper.pid) | {BOOT_ID: "another"})


def test_a_start_does_not_change_while_the_process_becomes_another_program():
    process = subprocess.Popen(["sh", "-c", "read -r go && exec sleep 60"], stdin=subprocess.PIPE)
    tags = identity(process.pid)
    assert process.stdin
    process.stdin.write(b"go\n")
    process.stdin.flush()
    try:
        deadline = time.monotonic() + 10
        while b"sleep" not in Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")[0]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert is_alive(tags)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()


def test_killing_ends_the_whole_group():
    process = subprocess.Popen(
        ["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout
    child = int(process.stdout.readline())
    child_tags = identity(child)
    kill_group(identity(process.pid))
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 10
    while is_alive(child_tags) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(child_tags)
