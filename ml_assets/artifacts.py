"""Content-addressed, immutable artifacts: publish whole, read verified.

Layout under the root (a local directory or any fsspec URL)::

    <kind>/<digest>/<files...>       the payload
    <kind>/<digest>/files.json       {"kind", "files": {name: {"sha256", "bytes"}}}; written last
    index/<kind>/<input_key>.json    {"digest", "record", "sha256"}: what a computation on these inputs gave

`digest` is the SHA-256 (64 hex) of the canonical JSON of files.json, so it depends on the payload alone.
What may differ between two computations of the same payload (time, cost, run ids) goes to the index record.
"""

import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import filelock
import fsspec
from fsspec.implementations.local import LocalFileSystem

from ml_assets.settings import Settings

FILES = "files.json"
_LEFTOVER_SECONDS = 60  # a staging directory this young may be about to be locked by its process
_log = logging.getLogger(__name__)


class ArtifactError(Exception):
    """An artifact is missing, incomplete or not what its digest says; the message names the file."""


@dataclass(frozen=True)
class ArtifactRef:
    """Names one artifact: `kind` (such as `adapter`) and `digest` (64 hex)."""

    kind: str
    digest: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.digest[:12]}"


@dataclass(frozen=True)
class Memo:
    """What the computation of `kind` with `input_key` gave, and its record."""

    kind: str
    input_key: str
    ref: ArtifactRef
    record: dict[str, Any]
    used_at: datetime.datetime
    """When it was noted, or found again where the store is local."""


@dataclass(frozen=True)
class Stored:
    """An artifact in the store: its size in bytes, when it was published, the names of its files."""

    ref: ArtifactRef
    bytes: int
    published_at: datetime.datetime
    files: tuple[str, ...]


def canonical_json(value: Any) -> bytes:
    """The one byte form of a JSON value: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; the error names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a readable JSON object: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file: a reader, or a crash at any point, sees the old content or the new, never a part."""
    _make_directory(path.parent)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync_directory(path.parent)


def _renamed(directory: Path, target: Path) -> bool:
    """Rename unless there is something at `target`."""
    try:
        os.rename(directory, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _make_directory(path: Path) -> None:
    """Create a directory and its parents so that they survive a crash of the host."""
    if not path.is_dir():
        _make_directory(path.parent)
        path.mkdir(exist_ok=True)
        _fsync_directory(path.parent)


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_dir():
            _fsync_directory(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _fsync_directory(directory)


def _device(path: Path) -> int:
    """The file system that `path` is on, or will be."""
    while not path.exists():
        path = path.parent
    return path.stat().st_dev


def _remove_leftovers(staging: Path) -> None:
    """Remove the staging directories whose process is gone: a living one holds a lock."""
    for path in staging.iterdir():
        with contextlib.suppress(OSError):
            if not path.is_dir() or time.time() - path.stat().st_mtime < _LEFTOVER_SECONDS:
                continue
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def _plain_files(directory: Path) -> dict[str, Path]:
    """{name: path} of the files below a directory, sorted. A link would let content change afterwards."""
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ArtifactError(f"{path}: expected plain files and folders, found a link or special file")
        if path.is_file():
            files[path.relative_to(directory).as_posix()] = path
    return files


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or str(path) != name or name == ".":
            raise ArtifactError(f"{name!r}: expected a relative path without '..'")


def _parse(ref: ArtifactRef, listing: bytes, where: str) -> dict[str, dict[str, Any]]:
    """{name: {"sha256", "bytes"}} of a listing whose hash is the artifact's name."""
    if sha256_bytes(listing) != ref.digest:
        raise ArtifactError(f"{where}/{FILES}: hash differs from the artifact's name {ref.digest}")
    content = json.loads(listing)
    if content["kind"] != ref.kind:
        raise ArtifactError(f"{where}/{FILES}: is of kind {content['kind']}, expected {ref.kind}")
    _check_names(content["files"])
    return content["files"]


class ArtifactStore:
    """Publishes and opens artifacts below `url`. Remote artifacts are read through `cache`, a directory that
    only this user can write (default: `<EVERGREEN_HOME>/cache/artifacts`)."""

    def __init__(self, url: str, cache: Path | None = None):
        self.fs, root = fsspec.core.url_to_fs(url)
        self.root = str(root).rstrip("/")
        self.local = isinstance(self.fs, LocalFileSystem)
        self.cache = cache or Settings.from_env().artifact_cache
        self._staging = (Path(self.root) if self.local else self.cache) / ".staging"

    # -- publish ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def staging(self, kind: str) -> Iterator[Path]:
        """A fresh directory to fill before `publish_directory`; it is on the store's own file system when
        that is local, so that publishing is a rename, and it is removed at exit. What killed processes have
        left there is removed too."""
        parent = self._staging
        _make_directory(parent)
        _remove_leftovers(parent)
        path = parent / f"{kind}-{uuid.uuid4().hex}"
        path.mkdir()
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # says that this process lives
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            os.close(descriptor)

    def publish(self, kind: str, files: Mapping[str, bytes]) -> ArtifactRef:
        """Publish small files given by content. Same content, same digest; publishing again is a no-op."""
        _check_names(files)
        with self.staging(kind) as directory:
            for name, data in files.items():
                path = directory / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            return self.publish_directory(kind, directory)

    def publish_directory(self, kind: str, directory: Path) -> ArtifactRef:
        """Publish every file below `directory` (it is consumed when the store is local).

        Two writers of the same content both succeed; a damaged artifact of the same content is replaced.
        Raises OSError when the disk is full, then nothing is visible; ArtifactError for an empty directory
        and for anything but plain files and folders.
        """
        if self.local and directory.stat().st_dev != _device(self._staging):
            with self.staging(kind) as staged:  # a rename can't cross file systems
                shutil.copytree(directory, staged, symlinks=True, dirs_exist_ok=True)
                return self.publish_directory(kind, staged)
        paths = _plain_files(directory)
        files = {
            name: {"sha256": sha256_file(path), "bytes": path.stat().st_size} for name, path in paths.items()
        }
        if not files or FILES in files:
            raise ArtifactError(f"{directory}: expected at least one file, and none named {FILES}")
        listing = canonical_json({"kind": kind, "files": files})
        ref = ArtifactRef(kind, sha256_bytes(listing))
        if self._is_intact(ref):
            return ref
        if self.local:
            (directory / FILES).write_bytes(listing)
            _fsync_tree(directory)
            self._install(directory, Path(self._directory(ref)), ref)
        else:
            target = self._directory(ref)
            for name, path in paths.items():
                self.fs.makedirs(os.path.dirname(f"{target}/{name}"), exist_ok=True)
                self.fs.put_file(str(path), f"{target}/{name}")
            self.fs.pipe_file(f"{target}/{FILES}", listing)  # last: without it the artifact does not exist
        return ref

    def _is_intact(self, ref: ArtifactRef) -> bool:
        """Whether publishing has nothing to do. A remote artifact is not downloaded for it."""
        if not self.exists(ref):
            return False
        try:
            if self.local:
                self._verify(ref, Path(self._directory(ref)))
            else:
                listing = self.fs.cat_file(f"{self._directory(ref)}/{FILES}")
                for name, entry in _parse(ref, listing, self._directory(ref)).items():
                    if self.fs.size(f"{self._directory(ref)}/{name}") != entry["bytes"]:
                        return False
        except (ArtifactError, OSError):
            return False
        return True

    def _install(self, directory: Path, target: Path, ref: ArtifactRef) -> None:
        """Rename `directory` (complete, on disk) to `target`, unless another process was first. What is left
        of a damaged artifact makes room."""
        _make_directory(target.parent)
        if not _renamed(directory, target):
            with filelock.FileLock(self._staging / "replace.lock"):
                try:
                    self._verify(ref, target)
                except ArtifactError as damage:
                    _log.warning("replacing a damaged artifact: %s", damage)
                    with self.staging(ref.kind) as trash:
                        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                            os.rename(target, trash / "damaged")
                        if not _renamed(directory, target):  # by one that found room, and did not wait
                            self._verify(ref, target)
        _fsync_directory(target.parent)

    # -- read ------------------------------------------------------------------------------------------

    def location(self, ref: ArtifactRef) -> str:
        """Path or object-store key of the artifact's folder, for people: read through `open`."""
        return self._directory(ref)

    def exists(self, ref: ArtifactRef) -> bool:
        return self.fs.exists(f"{self._directory(ref)}/{FILES}")

    def open(self, ref: ArtifactRef) -> Path:
        """A local directory with the artifact's files, every one of them verified.

        Raises ArtifactError that names the file when one is missing, unexpected, unreadable or its hash
        differs.
        """
        if not self.exists(ref):
            raise ArtifactError(f"{ref.kind} {ref.digest}: no such artifact in {self.root}")
        if not self.local:
            return self._fetch(ref)
        directory = Path(self._directory(ref))
        self._verify(ref, directory)
        return directory

    def _fetch(self, ref: ArtifactRef) -> Path:
        """The verified local copy of a remote artifact; a missing or damaged copy is downloaded."""
        target = self.cache / ref.kind / ref.digest
        with contextlib.suppress(ArtifactError):
            self._verify(ref, target)
            return target
        with self.staging(ref.kind) as temporary:
            try:
                listing = self.fs.cat_file(f"{self._directory(ref)}/{FILES}")
                for name in _parse(ref, listing, self._directory(ref)):
                    (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                    self.fs.get_file(f"{self._directory(ref)}/{name}", str(temporary / name))
            except OSError as error:
                raise ArtifactError(f"{ref}: cannot be read from {self.root}: {error}") from error
            (temporary / FILES).write_bytes(listing)
            self._verify(ref, temporary)
            self._install(temporary, target, ref)
        return target

    def _verify(self, ref: ArtifactRef, directory: Path) -> None:
        try:
            expected = _parse(ref, (directory / FILES).read_bytes(), str(directory))
            found = _plain_files(directory)
            for name in sorted(set(found) - set(expected) - {FILES}):
                raise ArtifactError(f"{found[name]}: not a file of artifact {ref}")
            for name, entry in expected.items():
                actual = sha256_file(directory / name)
                if actual != entry["sha256"]:
                    raise ArtifactError(f"{directory / name}: hash is {actual}, expected {entry['sha256']}")
        except OSError as error:
            raise ArtifactError(f"{ref}: cannot be read: {error}") from error

    def delete(self, ref: ArtifactRef) -> None:
        """Remove an artifact; no-op when it is not there. A reader finds all of it or nothing: locally it is
        moved away first, remotely its listing goes first."""
        directory = self._directory(ref)
        if self.local:
            with self.staging(ref.kind) as trash, contextlib.suppress(FileNotFoundError):
                os.rename(directory, trash / "deleted")
        else:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm(f"{directory}/{FILES}")
                self.fs.rm(directory, recursive=True)
            shutil.rmtree(self.cache / ref.kind / ref.digest, ignore_errors=True)

    # -- memo ------------------------------------------------------------------------------------------

    def remember(self, kind: str, input_key: str, ref: ArtifactRef, record: Mapping[str, Any]) -> None:
        """Note that the computation with `input_key` gave `ref`; `record` is JSON (cost, time, run ids)."""
        body = {"digest": ref.digest, "record": dict(record)}
        data = canonical_json(body | {"sha256": sha256_bytes(canonical_json(body))})
        path = self._index(kind, input_key)
        if self.local:
            write_atomic(Path(path), data)
        else:
            self.fs.makedirs(os.path.dirname(path), exist_ok=True)
            self.fs.pipe_file(path, data)

    def recall(self, kind: str, input_key: str) -> tuple[ArtifactRef, dict[str, Any]] | None:
        """What `remember` noted, if the artifact is still there; else None, and the caller computes.

        Raises ArtifactError when the note itself is damaged.
        """
        path = self._index(kind, input_key)
        if not self.fs.exists(path):
            return None
        try:
            entry = json.loads(self.fs.cat_file(path))
            check = entry.pop("sha256")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{path}: not a readable index entry: {error}") from error
        if sha256_bytes(canonical_json(entry)) != check:
            raise ArtifactError(f"{path}: hash of the index entry differs; delete the file to compute again")
        ref = ArtifactRef(kind, entry["digest"])
        if not self.exists(ref):
            return None
        if self.local:  # the time of its last use: garbage collection leaves alone what is used
            with contextlib.suppress(OSError):
                os.utime(path)
        return ref, entry["record"]

    def memos(self, kind: str | None = None) -> Iterator[Memo]:
        """All that `remember` noted, of one kind or of all; damaged notes are left out."""
        pattern = f"{self.root}/index/{kind or '*'}/*.json"
        for path in sorted(self.fs.glob(pattern)):
            try:
                entry = json.loads(self.fs.cat_file(path))
                check = entry.pop("sha256")
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue
            if sha256_bytes(canonical_json(entry)) == check:
                folder, name = str(path).rsplit("/", 2)[-2:]
                ref = ArtifactRef(folder, entry["digest"])
                yield Memo(folder, name.removesuffix(".json"), ref, entry["record"], self._time(path))

    def used_at(self, kind: str, input_key: str) -> datetime.datetime | None:
        """`Memo.used_at` as it is now; None when there is no such note."""
        try:
            return self._time(self._index(kind, input_key))
        except FileNotFoundError:
            return None

    def forget(self, kind: str, input_key: str) -> None:
        """Remove a note of `remember`; no-op when there is none."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self._index(kind, input_key))

    # -- listing ---------------------------------------------------------------------------------------

    def stored(self) -> Iterator[Stored]:
        """All whole artifacts, by kind and digest, as their listings say; nothing is verified."""
        for path in sorted(self.fs.glob(f"{self.root}/*/*/{FILES}")):
            kind, digest = str(path).rsplit("/", 3)[-3:-1]
            if (found := self.look(ArtifactRef(kind, digest))) is not None:
                yield found

    def look(self, ref: ArtifactRef) -> Stored | None:
        """Size and time of an artifact; None when it is not there or its listing is damaged."""
        path = f"{self._directory(ref)}/{FILES}"
        try:
            files = _parse(ref, listing := self.fs.cat_file(path), self._directory(ref))
            size = len(listing) + sum(entry["bytes"] for entry in files.values())
            return Stored(ref, size, self._time(path), tuple(files))
        except (ArtifactError, OSError, ValueError, KeyError, TypeError):
            return None

    def content(self, ref: ArtifactRef, name: str) -> bytes:
        """One file of an artifact, not verified: to look for what it names."""
        _check_names([name])
        return self.fs.cat_file(f"{self._directory(ref)}/{name}")

    def _time(self, path: str) -> datetime.datetime:
        return self.fs.modified(path)

    def _directory(self, ref: ArtifactRef) -> str:
        return f"{self.root}/{ref.kind}/{ref.digest}"

    def _index(self, kind: str, input_key: str) -> str:
        return f"{self.root}/index/{kind}/{input_key}.json"
