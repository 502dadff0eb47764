"""Content-addressed, immutable artifacts: publish whole, read verified.

Layout under the root (a local directory or any fsspec URL)::

    <kind>/<digest>/<files...>       the payload
    <kind>/<digest>/files.json       {"kind", "files": {name: {"sha256", "bytes"}}}; written last
    index/<kind>/<input_key>.json    {"digest", "record", "sha256"}: what a computation on these inputs gave

`digest` is the SHA-256 (64 hex) of the canonical JSON of files.json, so it depends on the payload alone.
What may differ between two computations of the same payload (time, cost, run ids) goes to the index record.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ml_assets.settings import Settings

FILES = "files.json"


class ArtifactError(Exception):
    """An artifact is missing, incomplete or not what its digest says; the message names the file."""


@dataclass(frozen=True)
class ArtifactRef:
    """Names one artifact: `kind` (such as `adapter`) and `digest` (64 hex)."""

    kind: str
    digest: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.digest[:12]}"


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


class ArtifactStore:
    """Publishes and opens artifacts below `url`. Remote artifacts are read through `cache`, a directory that
    only this user can write (default: `<EVERGREEN_HOME>/cache/artifacts`)."""

    def __init__(self, url: str, cache: Path | None = None):
        self.fs, root = fsspec.core.url_to_fs(url)
        self.root = str(root).rstrip("/")
        self.local = isinstance(self.fs, LocalFileSystem)
        self.cache = cache or Settings.from_env().artifact_cache

    # -- publish ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def staging(self, kind: str) -> Iterator[Path]:
        """A fresh directory to fill before `publish_directory`; it is on the store's own file system when
        that is local, so that publishing is a rename, and it is removed at exit."""
        if self.local:
            parent = Path(self.root) / ".staging"
            parent.mkdir(parents=True, exist_ok=True)
        else:
            parent = None
        path = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=parent))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def publish(self, kind: str, files: Mapping[str, bytes]) -> ArtifactRef:
        """Publish small files given by content. Same content, same digest; publishing again is a no-op."""
        with self.staging(kind) as directory:
            for name, data in files.items():
                path = directory / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            return self.publish_directory(kind, directory)

    def publish_directory(self, kind: str, directory: Path) -> ArtifactRef:
        """Publish every file below `directory` (it is consumed when the store is local).

        Raises OSError when the disk is full; then nothing is visible. Two writers of the same content both
        succeed.
        """
        files = {
            path.relative_to(directory).as_posix(): {
                "sha256": sha256_file(path),
                "bytes": path.stat().st_size,
            }
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        }
        if not files or FILES in files:
            raise ArtifactError(f"{directory}: expected at least one file, and none named {FILES}")
        listing = canonical_json({"kind": kind, "files": files})
        ref = ArtifactRef(kind, sha256_bytes(listing))
        if self.exists(ref):
            return ref
        (directory / FILES).write_bytes(listing)
        if self.local:
            self._publish_local(ref, directory)
        else:
            target = self._directory(ref)
            for name in [*files, FILES]:  # the listing last: without it the artifact does not exist
                self.fs.makedirs(os.path.dirname(f"{target}/{name}"), exist_ok=True)
                self.fs.put_file(str(directory / name), f"{target}/{name}")
        return ref

    def _publish_local(self, ref: ArtifactRef, directory: Path) -> None:
        for path in directory.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            else:
                _fsync_directory(path)
        _fsync_directory(directory)
        target = Path(self._directory(ref))
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not self.exists(ref):
            shutil.rmtree(target)  # what is left of a deletion that was interrupted
        try:
            os.rename(directory, target)
        except OSError:
            if not self.exists(ref):  # else another writer was first, with the same content
                raise
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
        directory = Path(self._directory(ref)) if self.local else self._download(ref)
        self._verify(ref, directory)
        return directory

    def _download(self, ref: ArtifactRef) -> Path:
        target = self.cache / ref.kind / ref.digest
        if (target / FILES).exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".fetch-", dir=target.parent))
        try:
            listing = self.fs.cat_file(f"{self._directory(ref)}/{FILES}")
            (temporary / FILES).write_bytes(listing)
            for name in json.loads(listing)["files"]:
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                self.fs.get_file(f"{self._directory(ref)}/{name}", str(temporary / name))
            self._verify(ref, temporary)
            with contextlib.suppress(OSError):  # another reader may have been first
                os.rename(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return target

    def _verify(self, ref: ArtifactRef, directory: Path) -> None:
        try:
            listing = (directory / FILES).read_bytes()
            if sha256_bytes(listing) != ref.digest:
                raise ArtifactError(
                    f"{directory / FILES}: hash differs from the artifact's name {ref.digest}"
                )
            expected = json.loads(listing)["files"]
            found = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if not p.is_dir()}
            for name in sorted(found - set(expected) - {FILES}):
                raise ArtifactError(f"{directory / name}: not a file of artifact {ref}")
            for name, entry in expected.items():
                path = directory / name
                actual = sha256_file(path)
                if actual != entry["sha256"]:
                    raise ArtifactError(f"{path}: hash is {actual}, expected {entry['sha256']}")
        except OSError as error:
            raise ArtifactError(f"{ref}: cannot be read: {error}") from error

    def delete(self, ref: ArtifactRef) -> None:
        """Remove an artifact. The listing goes first, so that a half-deleted artifact does not exist."""
        directory = self._directory(ref)
        self.fs.rm(f"{directory}/{FILES}")
        self.fs.rm(directory, recursive=True)

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
        except (ValueError, KeyError) as error:
            raise ArtifactError(f"{path}: not a readable index entry: {error}") from error
        if sha256_bytes(canonical_json(entry)) != check:
            raise ArtifactError(f"{path}: hash of the index entry differs; delete the file to compute again")
        ref = ArtifactRef(kind, entry["digest"])
        return (ref, entry["record"]) if self.exists(ref) else None

    def _directory(self, ref: ArtifactRef) -> str:
        return f"{self.root}/{ref.kind}/{ref.digest}"

    def _index(self, kind: str, input_key: str) -> str:
        return f"{self.root}/index/{kind}/{input_key}.json"
