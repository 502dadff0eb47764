"""Requests written out for a person to label, and the way back."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_assets.artifacts import write_atomic
from ml_assets.traffic.records import TrafficRecord


class LabelError(Exception):
    """A file of labels can't be read; the message names the file, the line and what was expected."""


def label_path(home: Path, customization: str, decision_id: str) -> Path:
    return home / "labels" / customization / f"{decision_id}.jsonl"


def write_requests(path: Path, records: Sequence[TrafficRecord]) -> None:
    """Write one line for each request, with an empty `right_answer` for a person to fill in. A file that is
    there already stays: somebody may be labelling it."""
    if not path.exists():
        lines = (json.dumps(_row(record), ensure_ascii=False) + "\n" for record in records)
        write_atomic(path, "".join(lines).encode())


def _row(record: TrafficRecord) -> dict[str, Any]:
    return {
        "request": record.id,
        "key": record.key_id,
        "at": record.at,
        "prompt": "\n".join(message["content"] for message in record.messages),
        "answer": record.answer,
        "right_answer": "",
    }


def read_labels(path: Path) -> Iterator[tuple[str, str, str]]:
    """(request id, key id, right answer) of every line that a person filled in. Raises LabelError."""
    try:
        content = path.read_bytes()
        lines = content.decode("utf-8-sig").split("\n")  # JSON may hold other line separators
    except OSError as error:
        raise LabelError(f"{path}: can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise LabelError(f"{path}:{number}: expected UTF-8 text ({error.reason})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found = tuple(row[name] for name in ("request", "key", "right_answer"))
        except (ValueError, KeyError, TypeError) as error:
            fields = "'request', 'key' and 'right_answer'"
            raise LabelError(f"{path}:{number}: expected a JSON object with {fields} ({error})") from error
        if not all(isinstance(value, str) for value in found):
            raise LabelError(f"{path}:{number}: expected texts, found {found}")
        if found[2].strip():
            yield found[0], found[1], found[2]
