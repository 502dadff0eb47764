"""Reading a source: rows, what is wrong with them, and a version that is the hash of their content."""

import base64
import codecs
import csv
import datetime
import glob
import importlib
import io
import itertools
import json
import lzma
import math
import os
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ml_assets.artifacts import canonical_json, sha256_bytes
from ml_assets.settings import Settings
from ml_assets.spec import (
    FileSource,
    HuggingFaceSource,
    PythonSource,
    Source,
    SqlSource,
    without_password,
)

LOOKAHEAD = 100
"""Rows of JSONL, or files with a header, that tell the columns: a column may be missing in the first one."""

UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)
"""What a file raises that is not there, cannot be reached, or is cut off or damaged while compressed."""


class SourceError(ValueError):
    """A source that cannot be read; the message names it and what was expected, without passwords."""

    def __init__(self, message: str) -> None:
        super().__init__(without_password(message))


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: where it stands, why, and how it begins."""

    place: str
    reason: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}" + (f" in {self.text!r}" if self.text else "")


Found = Iterator[tuple[str, Mapping[str, Any] | BadRow]]


@dataclass(frozen=True)
class SourceRows:
    """Rows of a source, as plain values (None, bool, int, float, str, list, dict), with the place of each
    (`faq.jsonl:12`, `query, row 12`), and the rows that could not be read at all."""

    name: str
    rows: list[dict[str, Any]]
    places: list[str]
    bad: list[BadRow]

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(column for row in self.rows for column in row))

    def version(self) -> str:
        """64 hex: hash of the rows as a multiset, so neither the order of files and rows nor their time or
        formatting matters."""
        hashes = [sha256_bytes(canonical_json(row)) for row in self.rows]
        hashes += [sha256_bytes(f"unreadable {bad.reason} {bad.text}".encode()) for bad in self.bad]
        return sha256_bytes("\n".join(sorted(hashes)).encode())


def read_source(source: Source, root: Path, settings: Settings) -> SourceRows:
    """Read a whole source. Relative paths start at `root`, the folder of the defs.yaml.

    A row that cannot be read (broken JSON, a line with too many fields) or written is in `bad`; the caller
    decides how many are too many. Raises SourceError when nothing can be read, or the source has no rows.
    """
    match source:
        case FileSource():
            name, found = describe(source), _files(source, root)
        case SqlSource():
            name, found = f"SQL query on {describe(source)}", _sql(source, root)
        case HuggingFaceSource():
            name, found = f"dataset {source.id}", _hugging_face(source, root, settings)
        case PythonSource():
            name, found = source.callable, _python(source, root)
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    bad: list[BadRow] = []
    for place, row in found:
        if isinstance(row, BadRow):
            bad.append(row)
        else:
            plain = {str(column): _plain(value) for column, value in row.items()}
            try:
                canonical_json(plain)  # not for half of a character (a lone surrogate), nor endless numbers
            except ValueError as error:
                text = repr(row)[:80] if isinstance(error, UnicodeError) else ""
                bad.append(BadRow(place, f"cannot be written as UTF-8 JSON ({error})", text))
            else:
                rows.append(plain)
                places.append(place)
    if not rows and not bad:
        raise SourceError(f"{name}: the source is empty, expected at least one row")
    return SourceRows(name, rows, places, bad)


def source_version(source: Source, root: Path, settings: Settings) -> str:
    """Hash of a source's content: see `SourceRows.version`."""
    return read_source(source, root, settings).version()


def source_columns(source: Source, root: Path) -> tuple[list[str], bool] | None:
    """The columns of local files, from a first look, and whether that look saw all there are; None when it
    would take a network, a query or a call, or the files are not there or not readable (reading them says
    why)."""
    if not isinstance(source, FileSource):
        return None
    try:
        if not isinstance(_filesystem(source, root)[0], LocalFileSystem):
            return None
        looked = list(itertools.islice(_first_look(source, *_resolve(source, root)), LOOKAHEAD + 1))
        rows = [row for _, row in looked[:LOOKAHEAD] if not isinstance(row, BadRow)]
        if not rows or len(rows) < min(len(looked), LOOKAHEAD):
            return None
        return list(dict.fromkeys(column for row in rows for column in row)), len(looked) <= LOOKAHEAD
    except (*UNREADABLE, ValueError):
        return None


def _first_look(source: FileSource, filesystem: fsspec.AbstractFileSystem, paths: list[str]) -> Found:
    """The rows of JSONL, of other files a row each with all columns."""
    for path in paths:
        if source.kind == "parquet":
            import pyarrow.parquet

            yield path, dict.fromkeys(pyarrow.parquet.read_schema(path).names)
        else:
            read = _csv if source.kind == "csv" else _jsonl
            with _open(filesystem, path) as file:
                yield from read(file, "", header_only=True)


def describe(source: Source) -> str:
    """Where a source's rows come from, in a line without passwords."""
    match source:
        case FileSource():
            return without_password(source.path)
        case SqlSource():
            import sqlalchemy
            from sqlalchemy.exc import ArgumentError

            try:
                url = sqlalchemy.make_url(without_password(source.url))
            except ArgumentError:
                return "a database"
            return without_password(url.render_as_string(hide_password=True))
        case HuggingFaceSource():
            return f"{source.id}@{source.revision} ({source.split})"
        case PythonSource():
            # their names only: any value may be a token that `{{ env.NAME }}` stood for
            return f"{source.callable}({', '.join(source.args)})"


# -- files ---------------------------------------------------------------------------------------------


def _files(source: FileSource, root: Path) -> Found:
    path = source.path
    try:
        filesystem, paths = _resolve(source, root)
        for path in paths:
            name = without_password(os.path.basename(path))
            if source.kind == "parquet":
                yield from _parquet(filesystem, path, name)
            else:
                read = _csv if source.kind == "csv" else _jsonl
                with _open(filesystem, path) as file:
                    yield from read(file, name)
    except UNREADABLE as error:
        raise SourceError(f"{path}: cannot be read: {error}") from _hidden(error)
    except SourceError:
        raise
    except ValueError as error:
        raise SourceError(f"{path}: expected a path or an fsspec URL: {error}") from _hidden(error)
    except Exception as error:
        if not type(error).__module__.startswith("aiohttp"):
            raise
        # a server that answers with an error or breaks off is like one that is not there: try again
        raise SourceError(f"{path}: cannot be read: {error}") from ConnectionError(
            without_password(str(error))
        )


def _hidden(error: Exception) -> Exception:
    """The error as a cause that Dagster may show and store, with all that led to it: where any of them names
    a password, only the text without it is left."""
    chain: list[BaseException] = [error]
    while (led := chain[-1].__cause__ or chain[-1].__context__) is not None and led not in chain:
        chain.append(led)
    if all(without_password(str(one)) == str(one) for one in chain):
        return error
    text = without_password(str(error))
    return OSError(text) if isinstance(error, OSError) else Exception(f"{type(error).__name__}: {text}")


def _filesystem(source: FileSource, root: Path) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path, glob or URL, and the path there; nothing is opened yet."""
    url = source.path
    if "://" not in url and "::" not in url:
        url = os.path.expanduser(url)
        if not os.path.isabs(url):
            url = os.path.join(glob.escape(str(root)) if glob.has_magic(url) else str(root), url)
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise SourceError(f"{source.path}: expected a path or an fsspec URL: {error}") from _hidden(error)


def _resolve(source: FileSource, root: Path) -> tuple[fsspec.AbstractFileSystem, list[str]]:
    """The file system and the files of a path, glob or URL, sorted."""
    filesystem, path = _filesystem(source, root)
    if glob.has_magic(path) and not filesystem.exists(path):
        paths = sorted(str(found) for found in filesystem.glob(path) if not filesystem.isdir(found))
    elif filesystem.isdir(path):
        raise SourceError(f"{source.path} is a folder, expected files such as {source.path}/*.{source.kind}")
    else:
        paths = [path] if filesystem.exists(path) else []
    if not paths:
        raise SourceError(
            f"{source.path}: no such file" + (f" (from {root})" if "://" not in source.path else "")
        )
    return filesystem, paths


def _open(filesystem: fsspec.AbstractFileSystem, path: str) -> Any:
    return filesystem.open(path, "rb", compression="infer")


def _jsonl(file: Iterable[bytes], name: str, header_only: bool = False) -> Found:
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        place = f"{name}:{number}"
        start = line[:80].decode(errors="replace").strip()
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            yield place, BadRow(place, f"not UTF-8 at byte {error.start + 1}", start)
        except json.JSONDecodeError as error:
            yield place, BadRow(place, f"not JSON ({error.msg} at column {error.colno})", start)
        except (RecursionError, ValueError) as error:
            reason = "too deep" if isinstance(error, RecursionError) else "a number with too many digits"
            yield place, BadRow(place, f"not JSON ({reason})", start)
        else:
            if isinstance(row, dict):
                yield place, row
            else:
                yield place, BadRow(place, f"expected a JSON object, found {type(row).__name__}", start)


def _csv(file: Any, name: str, header_only: bool = False) -> Found:
    try:
        text = io.TextIOWrapper(file, "utf-8-sig", newline="")
        delimiter = max(",;\t|", key=text.readline().count)
        text.seek(0)
        reader = csv.DictReader(text, delimiter=delimiter, strict=True)
        fields = list(reader.fieldnames or [])
        if header_only:
            yield name, dict.fromkeys(fields)
            return
        if len(set(fields)) < len(fields):
            raise SourceError(f"{name}:1: expected different column names, found {', '.join(fields)}")
        line = reader.line_num + 1
        for row in reader:
            place, line = f"{name}:{line}", reader.line_num + 1
            if None in row:  # the key of surplus fields; any text, "" too, can be the name of a column
                found = len(fields) + len(row[None])
                start = ", ".join(str(row[field]) for field in fields)[:80]
                yield place, BadRow(place, f"expected {len(fields)} fields, found {found}", start)
            elif None in row.values():
                found = sum(value is not None for value in row.values())
                start = ", ".join(str(value) for value in row.values() if value is not None)[:80]
                yield place, BadRow(place, f"expected {len(fields)} fields, found {found}", start)
            else:
                yield place, row
    except UnicodeDecodeError as error:
        raise SourceError(f"{name}: not UTF-8 at byte {error.start + 1} of what was read") from error
    except csv.Error as error:
        raise SourceError(f"{name}: not CSV: {error}") from error


def _parquet(filesystem: fsspec.AbstractFileSystem, path: str, name: str) -> Found:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with filesystem.open(path, "rb") as file:
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}, row {number}", row
    except pyarrow.ArrowException as error:
        raise SourceError(f"{path}: not Parquet: {error}") from error


# -- the others ----------------------------------------------------------------------------------------


def _sql(source: SqlSource, root: Path) -> Found:
    import sqlalchemy
    from sqlalchemy.exc import SQLAlchemyError

    name = describe(source)
    try:
        url = sqlalchemy.make_url(source.url)
        if (
            url.get_backend_name() == "sqlite"
            and url.database
            and not url.database.startswith((":", "file:"))
        ):
            file = root / url.database
            if not file.exists():  # SQLite would make an empty one
                raise SourceError(f"{name}: no such file {file}")
            url = url.set(database=str(file))
        engine = sqlalchemy.create_engine(url)
        try:
            with engine.connect() as connection:
                result = connection.execute(sqlalchemy.text(source.query))
                for number, row in enumerate(result.mappings(), start=1):
                    yield f"query, row {number}", dict(row)
        finally:
            engine.dispose()
    except (SQLAlchemyError, ImportError) as error:
        raise SourceError(f"{name}: the query failed: {error}") from _hidden(error)


def _hugging_face(source: HuggingFaceSource, root: Path, settings: Settings) -> Found:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets

    local = root / source.id
    try:
        rows = datasets.load_dataset(
            str(local) if local.is_dir() else source.id,
            name=source.config,
            split=source.split,
            revision=None if local.is_dir() else source.revision,
            cache_dir=str(settings.downloads / "datasets"),
        )
    except Exception as error:  # the library raises its own, the hub's, pyarrow's and others
        message = f"dataset {describe(source)}: {type(error).__name__}: {error}"
        raise SourceError(message) from _hidden(error)
    for number, row in enumerate(rows, start=1):
        yield f"{source.split}, row {number}", dict(row)


def _python(source: PythonSource, root: Path) -> Found:
    module_name, _, function_name = source.callable.partition(":")
    project = next((path for path in [root, *root.parents] if (path / "pyproject.toml").exists()), root)
    # a worker may run without the project on its path; nothing that is on the path is hidden
    sys.path += [path for path in (str(project), str(root)) if path not in sys.path]
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise SourceError(f"{source.callable}: cannot be imported: {error}") from error
    try:
        result = function(**source.args)
        if hasattr(result, "to_dict") and hasattr(result, "columns"):
            result = result.to_dict("records")
        if isinstance(result, Mapping) or not isinstance(result, Iterable):
            expected = "expected an iterable of dicts or a DataFrame"
            raise SourceError(f"{source.callable}: {expected}, found {type(result).__name__}")
        for number, row in enumerate(result, start=1):
            place = f"{function_name}(), row {number}"
            if isinstance(row, Mapping):
                yield place, row
            else:
                yield place, BadRow(place, f"expected a dict, found {type(row).__name__}", repr(row)[:80])
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(f"{source.callable}: raised {type(error).__name__}: {error}") from _hidden(error)


def _plain(value: Any) -> Any:
    """JSON's types, so that equal values from different kinds of source are equal."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, datetime.date | datetime.time):
        return None if value != value else value.isoformat()  # pandas' missing time is unequal to itself
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if hasattr(value, "tolist"):  # numpy
        return _plain(value.tolist())
    return None if type(value).__name__ in ("NAType", "NaTType") else str(value)
