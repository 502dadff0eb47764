"""Breaks chosen file operations: the process is killed before, in the middle of or after one, or the disk
reports an error."""

import contextlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

KILLS = ("before", "torn", "after")
OPERATIONS = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir", "open")


@contextlib.contextmanager
def broken(below: Path, at: int, how: str | int) -> Iterator[list[str]]:
    """While inside, break the `at`-th (from 1) file operation below a folder
    (`how`: one of KILLS, or an errno).

    Yields the growing list of operations seen, such as "write weights.tmp". A write that is killed "torn", or
    that fails, leaves half of its bytes in the file.
    """
    seen: list[str] = []

    def during(name: str, path: object, run: Callable[[], object], half: Callable[[], object]) -> object:
        seen.append(f"{name} {os.path.basename(str(path))}")
        if len(seen) != at:
            return run()
        if how == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "torn" or isinstance(how, int):
            half()
        else:
            run()
        if isinstance(how, int):
            raise OSError(how, os.strerror(how), str(path))
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    def ours(target: object) -> bool:
        if isinstance(target, int):
            target = os.readlink(f"/proc/self/fd/{target}")
        return str(below) in str(target)

    def operation(name: str) -> Callable[..., object]:
        original = getattr(os, name)

        def call(target, *args, **kwargs):
            if not ours(target) or (name == "open" and not (args and args[0] & os.O_CREAT)):
                return original(target, *args, **kwargs)
            return during(name, target, lambda: original(target, *args, **kwargs), lambda: None)

        return call

    original_open = io.open

    def open_file(file, mode="r", *args, **kwargs):
        opened = original_open(file, mode, *args, **kwargs)
        if not ours(file) or not set(mode) & set("wax+"):
            return opened
        seen_file = str(file)
        write = opened.write

        def broken_write(data):
            def half():
                write(data[: len(data) // 2])
                opened.flush()

            def whole():
                result = write(data)
                opened.flush()
                return result

            return during("write", seen_file, whole, half)

        return _Writer(opened, broken_write)

    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, operation(name))
        patch.setattr(io, "open", open_file)
        patch.setattr("builtins.open", open_file)
        yield seen


class _Writer:
    def __init__(self, file, write):
        self._file, self.write = file, write

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *error):
        return self._file.__exit__(*error)


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process; the signal that ended it (9: killed), or 0. Other ends are errors."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.stderr)
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert status in (0, signal.SIGKILL), f"the process ended with status {status}"
    return status
