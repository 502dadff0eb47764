"""From the rows of a source to a snapshot: clean, deduplicated, split, without leakage, always the same."""

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ml_assets.artifacts import canonical_json, sha256_bytes
from ml_assets.datasets.admission import Said, admit
from ml_assets.datasets.duplicates import NearIndex, count_leaks, fold, shingles
from ml_assets.datasets.redaction import redactor
from ml_assets.datasets.sources import BadRow, SourceRows, describe
from ml_assets.datasets.split import is_evaluation
from ml_assets.eval_reports.metrics import json_leaves, normalize_label, parse_json
from ml_assets.spec import CustomizationSpec

CODE_VERSION = "3"
"""Raised by hand when the same source would give another snapshot."""

SHOWN = 5
"""Examples of each finding that a person sees."""

NOTES = ("_origin", "_said", "_key", "_count")
"""Columns about a row that are no part of it; each is there only where some row needs it."""

Row = dict[str, str]


class SnapshotError(ValueError):
    """Rows that do not make a dataset; the message names the columns, rows and reasons."""


@dataclass
class Snapshot:
    """Rows of both sides, sorted by `_row`, and what happened on the way.

    `removed` counts rows by reason, `examples` shows some of them, `measured` is what the checks judge,
    `feedback` what became of the right answers of users (empty where there were none).
    """

    train: list[Row]
    evaluation: list[Row]
    columns: list[str]
    removed: dict[str, int]
    redacted: dict[str, int]
    examples: list[dict[str, str]] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    feedback: dict[str, Any] = field(default_factory=dict)


def build_snapshot(
    spec: CustomizationSpec,
    source: SourceRows,
    parent: list[Row] | None = None,
    feedback: Sequence[Said] = (),
) -> Snapshot:
    """The snapshot of a source and of right answers from users. It depends on the multiset of rows, the spec,
    `parent` and `feedback` only. Where a row of it came from feedback, all have a column `_origin`: `source`,
    `feedback`, or `champion` for a right answer that is the model's own; `_said`, the number of the feedback
    that said so ("" for the source's), which grows with time; and `_key`, the id of the API key that said it.
    Where the source has a row more than once, all have `_count`: how often it has each ("1", "2", ...).

    Args:
        parent: evaluation rows of the snapshot before this one: they are kept, also when the source dropped
            them, so that evaluations of two snapshots can be compared.

    Raises SnapshotError for a missing column or too many bad rows, RedactionUnavailable.
    """
    state = _Builder(spec)
    rows = state.validate(source)
    rows = state.drop_unscorable(state.redact(rows), "bad_row")  # a number in JSON may be personal data
    frozen = state.keep_parent(parent or [], rows)
    rows, frozen = state.drop_repeats(rows, frozen)
    joined, frozen = state.admit_feedback(feedback, rows, frozen)
    rows += joined
    rows = state.drop_conflicts(rows, frozen)
    train = [row for row in rows if not state.evaluates(row)]
    evaluation = frozen + [row for row in rows if state.evaluates(row)]
    evaluation = list({row["_row"]: row for row in reversed(evaluation)}.values())
    train = state.drop_leaks(train, evaluation)
    train = state.drop_near_duplicates(train)
    if any("_origin" in row for row in [*train, *evaluation]):
        unsaid = {"_origin": "source", "_said": "", "_key": ""}
        train, evaluation = ([unsaid | row for row in side] for side in (train, evaluation))
    if any("_count" in row for row in [*train, *evaluation]):
        train, evaluation = ([{"_count": "1"} | row for row in side] for side in (train, evaluation))
    snapshot = Snapshot(
        train=sorted(({**row, "_split": "train"} for row in train), key=lambda row: row["_row"]),
        evaluation=sorted(
            ({**row, "_split": "evaluation"} for row in evaluation), key=lambda row: row["_row"]
        ),
        columns=spec.columns(),
        removed={reason: number for reason, number in state.removed.items() if number},
        redacted=dict(sorted(state.redacted.items())),
        examples=state.examples,
    )
    snapshot.measured = state.measure(snapshot, frozen)
    if feedback:
        origins = Counter(row.get("_origin", "source") for row in [*snapshot.train, *snapshot.evaluation])
        snapshot.feedback = {
            "given": len(feedback),
            "rows": {name: origins[name] for name in ("feedback", "champion")},
            "keys": state.feedback_keys,
        }
    return snapshot


def write_snapshot(snapshot: Snapshot, directory: Path, manifest: Mapping[str, Any]) -> None:
    """Write `rows.parquet` and `manifest.json`. Same content, same bytes (for one version of pyarrow)."""
    import pyarrow
    import pyarrow.parquet

    rows = sorted([*snapshot.train, *snapshot.evaluation], key=lambda row: row["_row"])
    notes = [name for name in NOTES if rows and name in rows[0]]
    names = [*snapshot.columns, "_row", "_split", *notes]
    table = pyarrow.table(
        {name: pyarrow.array([row[name] for row in rows], pyarrow.string()) for name in names}
    )
    pyarrow.parquet.write_table(
        table,
        directory / "rows.parquet",
        version="2.6",
        compression="zstd",
        compression_level=3,
        row_group_size=65536,
        store_schema=False,
    )
    (directory / "manifest.json").write_bytes(canonical_json(manifest))


def load_rows(directory: Path, split: str) -> list[Row]:
    """Rows of one side (`train` or `evaluation`) of a dataset artifact, sorted by `_row`: the columns as
    strings, `_row`, `_split`, and those of NOTES that the dataset has."""
    import pyarrow.parquet

    if split not in ("train", "evaluation"):
        raise ValueError(f"{split!r}: expected 'train' or 'evaluation'")
    table = pyarrow.parquet.read_table(directory / "rows.parquet")
    return [row for row in table.to_pylist() if row["_split"] == split]


def load_manifest(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "manifest.json").read_bytes())


def build_manifest(
    spec: CustomizationSpec, snapshot: Snapshot, source_version: str, parent: str | None
) -> dict[str, Any]:
    """What a snapshot is, for those who read it without this code. `parent` is the digest of the snapshot
    whose evaluation rows it kept."""
    said = {"feedback": snapshot.feedback} if snapshot.feedback else {}
    return {
        "customization": spec.name,
        "rows": {"train": len(snapshot.train), "evaluation": len(snapshot.evaluation)},
        "columns": snapshot.columns,
        "source_version": source_version,
        "removed": snapshot.removed,
        "redacted": snapshot.redacted,
        "parent": parent,
        "spec": {
            "source": f"{spec.source.kind}: {describe(spec.source)}",
            "dataset": spec.dataset.model_dump(),
            "prompt": spec.prompt.model_dump(),
        },
        "measured": snapshot.measured,
        "code_version": CODE_VERSION,
        **said,
    }


def normalize(value: Any) -> str:
    """A value as text: NFC, line ends as \\n, no invisible characters, no space at line ends or around.

    Numbers and booleans are written as in JSON, lists and objects as JSON. None becomes "".
    """
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    # a no-break space is a space to a reader; zero-width characters, BOM and NUL are nothing
    text = re.sub(r"[\u200b\u2060\ufeff\x00]", "", text.replace("\u00a0", " "))
    return re.sub(r"[ \t]+(?=\n|$)", "", text).strip()


def same_target(task: str, target: str) -> str:
    """A text that two targets have in common when the scores of the task cannot tell them apart: another
    order of JSON keys or another case of a class label is not another answer."""
    if task == "classification":
        return normalize_label(target) or target  # of a label of quotes or stars nothing would be left
    if task == "json":
        try:
            value = _whole_numbers(parse_json(target))
            # half of a character is fine as an escape, and nowhere else
            return (
                json.dumps(value, sort_keys=True, ensure_ascii=False)
                .encode(errors="backslashreplace")
                .decode()
            )
        except (ValueError, RecursionError):
            return target
    return target


def _whole_numbers(value: Any) -> Any:
    """1.0 is 1."""
    if isinstance(value, dict):
        return {key: _whole_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


class _Builder:
    """The steps of one build, and the counts they leave behind."""

    def __init__(self, spec: CustomizationSpec) -> None:
        self.spec = spec
        prompt = spec.prompt.columns()
        self.input_columns = list(dict.fromkeys([*prompt.get("system", []), *prompt["user"]]))
        self.template_columns = list(dict.fromkeys([*self.input_columns, *prompt["target"]]))
        self.removed: Counter[str] = Counter()
        self.redacted: Counter[str] = Counter()
        self.examples: list[dict[str, str]] = []
        self.conflicts = 0
        self.without_group = 0
        self.feedback_keys: dict[str, dict[str, Any]] = {}

    # -- what a row is ---------------------------------------------------------------------------------

    def input_text(self, row: Mapping[str, str]) -> str:
        return "\n".join(row[column] for column in self.input_columns)

    def target_text(self, row: Mapping[str, str]) -> str:
        return self.spec.prompt.target.format_map(row)

    def target_key(self, row: Mapping[str, str]) -> str:
        return same_target(self.spec.evaluation.task, self.target_text(row))

    def row_hash(self, row: Mapping[str, str]) -> str:
        """Identity of a row: what the model sees and answers, and its group. Segments and clusters are notes
        about it."""
        group = self.spec.dataset.group_by
        columns = [*self.template_columns, *([group] if group else [])]
        return sha256_bytes(canonical_json({column: row[column] for column in columns}))

    def split_key(self, row: Mapping[str, str]) -> str:
        """Its group, or its input: a row whose label is corrected stays on its side."""
        group = self.spec.dataset.group_by
        return f"group {row[group]}" if group and row[group] else f"input {fold(self.input_text(row))}"

    def evaluates(self, row: Mapping[str, str]) -> bool:
        return is_evaluation(self.split_key(row), self.spec.dataset.evaluation_share)

    def remove(self, reason: str, row: Mapping[str, str], why: str = "") -> None:
        self.removed[reason] += 1
        if sum(example["reason"] == reason for example in self.examples) < SHOWN:
            shown = " → ".join(_short(text) for text in (self.input_text(row), self.target_text(row)))
            self.examples.append({"reason": reason, "row": shown, "because": _short(why)})

    # -- steps -----------------------------------------------------------------------------------------

    def validate(self, source: SourceRows) -> list[Row]:
        """Rows as normalized strings, in an order of their own. Raises SnapshotError."""
        columns = self.spec.columns()
        missing = [column for column in columns if column not in source.columns]
        if missing and source.rows:
            raise SnapshotError(
                f"{source.name}: no column {', '.join(map(repr, missing))}; "
                f"the columns are: {', '.join(source.columns)}"
            )
        good: list[Row] = []
        bad = list(source.bad)
        for raw, place in zip(source.rows, source.places, strict=True):
            row = {column: normalize(raw.get(column)) for column in columns}
            if reason := self._fault(raw, row):
                text = _short(json.dumps(raw, ensure_ascii=False), 80)
                bad.append(BadRow(place, reason, text))
            else:
                good.append(row)
        self._judge_bad(source, bad)
        return sorted(good, key=lambda row: [row[column] for column in columns])

    def _fault(self, raw: Mapping[str, Any], row: Row) -> str | None:
        for column in self.template_columns:
            if column not in raw:
                return f"column {column!r} is missing"
            if not row[column]:
                return f"column {column!r} is empty"
        limit, words = self.spec.adapter.max_length, len(self.target_text(row).split())
        if limit is not None and words >= limit:  # every word is at least one token
            return f"the target has {words} words, which cannot fit adapter.max_length {limit} tokens"
        return self._unscorable(row)

    def _unscorable(self, row: Row) -> str | None:
        """Why no answer could be compared with the target: one such row would fail every report."""
        if self.spec.evaluation.task == "json":
            try:
                json_leaves(parse_json(self.target_text(row)))
            except (ValueError, RecursionError) as error:
                return f"the target is not JSON ({error})"
        return None

    def _judge_bad(self, source: SourceRows, bad: list[BadRow]) -> None:
        total = len(source.rows) + len(source.bad)
        allowed = self.spec.dataset.max_bad_share
        if len(bad) > allowed * total:
            first = "\n".join(f"  {row}" for row in bad[:SHOWN])
            more = f"\n  and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
            raise SnapshotError(
                f"{source.name}: {len(bad)} of {total} rows cannot be used, "
                f"dataset.max_bad_share allows {allowed:.2%}:\n{first}{more}"
            )
        self.removed["bad_row"] = len(bad)
        redact = redactor(self.spec.dataset.redact)
        self.examples += [
            {"reason": "bad_row", "row": redact(row.text)[0], "because": f"{row.place}: {row.reason}"}
            for row in bad[:SHOWN]
        ]

    def redact(self, rows: list[Row]) -> list[Row]:
        """Personal data out of every column. A group or cluster that is personal data (a customer's address)
        becomes a hash, so that it still tells rows apart."""
        redact = redactor(self.spec.dataset.redact)
        names = {self.spec.dataset.group_by, self.spec.evaluation.cluster} - set(self.template_columns)
        clean: list[Row] = []
        for row in rows:
            new: Row = {}
            for column, text in row.items():
                new[column], found = (text, ()) if column in NOTES else redact(text)
                if found and column in names:
                    new[column] = sha256_bytes(text.encode())[:16]
                self.redacted.update(found)
            clean.append(new | {"_row": self.row_hash(new)})
        return clean

    def drop_unscorable(self, rows: list[Row], reason: str) -> list[Row]:
        kept: list[Row] = []
        for row in rows:
            if why := self._unscorable(row):
                self.remove(reason, row, why)
            else:
                kept.append(row)
        return kept

    def drop_repeats(self, rows: list[Row], frozen: list[Row]) -> tuple[list[Row], list[Row]]:
        """Of rows that are the same but for the spelling of the target, keep the first, or the frozen one;
        note how often the source has it. What the source dropped keeps the count of before."""
        frozen_rows = {row["_row"] for row in frozen}
        known = {self._meaning(row): row["_row"] for row in frozen}
        kept: dict[str, Row] = {}
        times: Counter[str] = Counter()
        for row in rows:
            name = row["_row"]
            if name not in frozen_rows:
                name = known.setdefault(self._meaning(row), name)
            times[name] += 1
            if name in kept or name != row["_row"]:
                self.remove("exact_duplicate", row)
            else:
                kept[name] = row

        def counted(row: Row) -> Row:
            n = times[row["_row"]]
            return row | {"_count": str(n)} if n > 1 else row if n == 0 else _without(row, "_count")

        return [counted(row) for row in kept.values()], [counted(row) for row in frozen]

    def _meaning(self, row: Row) -> str:
        group = self.spec.dataset.group_by
        columns = [*self.input_columns, *([group] if group else [])]
        return json.dumps([[row[column] for column in columns], self.target_key(row)])

    def keep_parent(self, parent: list[Row], rows: list[Row]) -> list[Row]:
        """Evaluation rows of the parent, with today's segments where the source still has the row. A row that
        lacks a column of the prompt, or cannot be scored, cannot be kept; nor one from feedback where the
        source has another target by now."""
        today = {row["_row"]: row for row in reversed(rows)}
        group = self.spec.dataset.group_by
        ungrouped = bool(parent and group and group not in parent[0])
        frozen: list[Row] = []
        for row in parent:
            if any(not row.get(column) for column in self.template_columns):
                self.removed["parent_without_column"] += 1
                continue
            kept = {column: row.get(column, "") for column in self.spec.columns()}
            if row.get("_origin", "source") != "source":
                kept |= {name: row.get(name, "") for name in ("_origin", "_said", "_key")}
            if row.get("_count", "1") != "1":
                kept["_count"] = row["_count"]
            frozen.append(kept)
        frozen = self.redact(frozen)  # the rules may have become stricter
        frozen = self.drop_unscorable(frozen, "parent_unscorable")
        if group and ungrouped:
            frozen = self._grouped(frozen, rows, group)
        frozen = [today.get(row["_row"], row) for row in frozen]
        return self._vouched(frozen, rows) if any("_origin" in row for row in frozen) else frozen

    def _vouched(self, frozen: list[Row], rows: list[Row]) -> list[Row]:
        """Without rows from feedback that the source contradicts; one that it confirms, in another spelling,
        is the source's."""
        targets: dict[str, set[str]] = defaultdict(set)
        for row in rows:
            targets[fold(self.input_text(row))].add(self.target_key(row))
        kept: list[Row] = []
        for row in frozen:
            found = targets.get(fold(self.input_text(row)), set()) if "_origin" in row else set()
            if others := found - {self.target_key(row)}:
                self.remove("parent_overruled", row, f"the source says {min(others)}")
            else:
                kept.append(_without(row, "_origin", "_said", "_key") if found else row)
        return kept

    def _grouped(self, frozen: list[Row], rows: list[Row], group: str) -> list[Row]:
        """Rows of a parent without the group column, with the group that the row, or at least its input, has
        in the source today: the rest of that group must not train."""

        def places(row: Row) -> list[tuple[str, ...]]:
            return [
                tuple(row[name] for name in names) for names in (self.template_columns, self.input_columns)
            ]

        groups: dict[tuple[str, ...], str] = {}
        for row in rows:
            for place in places(row):
                groups.setdefault(place, row[group])
        grouped: list[Row] = []
        for row in frozen:
            found = next((groups[place] for place in places(row) if place in groups), None)
            self.without_group += found is None
            new = row | {group: found or ""}
            grouped.append(new | {"_row": self.row_hash(new)})
        return grouped

    def admit_feedback(
        self, feedback: Sequence[Said], rows: list[Row], frozen: list[Row]
    ) -> tuple[list[Row], list[Row]]:
        """The right answers of users that join, and the frozen rows that stay beside them. Answers that are
        the model's own stay among them, also where they evaluate: without them, the new evaluation rows would
        be its mistakes alone."""
        said: list[Said] = []
        for one in feedback:
            row = {column: normalize(one.row.get(column)) for column in self.spec.columns()}
            if reason := self._fault(row, row):
                self.remove("feedback_unusable", row, reason)
            else:
                said.append(replace(one, row=row))
        clean = self.redact([one.row for one in said])
        scorable = {row["_row"] for row in self.drop_unscorable(clean, "feedback_unusable")}
        said = [
            replace(one, row=row) for one, row in zip(said, clean, strict=True) if row["_row"] in scorable
        ]
        spec = self.spec
        standing = [
            Said(row, row["_key"], int(row["_said"] or 0), "feedback") for row in frozen if "_origin" in row
        ]
        admitted = admit(
            said,
            [*rows, *(row for row in frozen if "_origin" not in row)],
            standing,
            spec.feedback,
            spec.dataset.near_duplicate,
            self.input_text,
            self.target_key,
            self.evaluates,
            self.remove,
        )
        self.feedback_keys = admitted.keys
        joined = {
            one.row["_row"]: one.row | {"_origin": one.origin, "_said": str(one.seq), "_key": one.key_id}
            for one in admitted.rows
        }
        for one in admitted.overruled:
            self.remove("parent_overruled", one.row, "the operator labelled it otherwise")
        overruled = {one.row["_row"] for one in admitted.overruled}
        return list(joined.values()), [row for row in frozen if row["_row"] not in overruled]

    def drop_conflicts(self, rows: list[Row], frozen: list[Row]) -> list[Row]:
        """Drop rows of an input that has several targets: nobody can learn or score them. A frozen row
        stays."""
        targets: dict[str, set[str]] = defaultdict(set)
        for row in [*rows, *frozen]:
            targets[fold(self.input_text(row))].add(self.target_key(row))
        frozen_rows = {row["_row"] for row in frozen}
        kept: list[Row] = []
        for row in rows:
            found = targets[fold(self.input_text(row))]
            if len(found) > 1 and row["_row"] not in frozen_rows:
                others = sorted(found - {self.target_key(row)})
                self.remove("conflicting_label", row, f"the same input also has the target {others[0]}")
            else:
                kept.append(row)
        self.conflicts = sum(len(found) > 1 for found in targets.values())
        return kept

    def drop_leaks(self, train: list[Row], evaluation: list[Row]) -> list[Row]:
        """Drop training rows that are, nearly are, or belong together with an evaluation row."""
        group = self.spec.dataset.group_by
        groups = {row[group] for row in evaluation if row[group]} if group else set()
        inputs = {fold(self.input_text(row)) for row in evaluation}
        signatures = {row["_row"]: shingles(self.input_text(row)) for row in [*train, *evaluation]}
        index = NearIndex(self.spec.dataset.near_duplicate, signatures.values())
        texts = {row["_row"]: self.input_text(row) for row in evaluation}
        for row in sorted(evaluation, key=lambda row: row["_row"]):
            index.add(row["_row"], signatures[row["_row"]])
        kept: list[Row] = []
        for row in train:
            if group and row[group] in groups:
                self.remove("leak_group", row, f"{group} {row[group]} evaluates")
            elif fold(self.input_text(row)) in inputs:
                self.remove("leak_exact", row, "the same input evaluates")
            elif (near := index.find(signatures[row["_row"]])) is not None:
                self.remove("leak_near", row, f"nearly the evaluation row {texts[near]}")
            else:
                kept.append(row)
        return kept

    def drop_near_duplicates(self, train: list[Row]) -> list[Row]:
        """Of training rows with one target and nearly one input, keep the first by hash."""
        ordered = sorted(train, key=lambda row: row["_row"])
        signatures = [shingles(self.input_text(row)) for row in ordered]
        texts = {row["_row"]: self.input_text(row) for row in ordered}
        index = NearIndex(self.spec.dataset.near_duplicate, signatures)
        kept: list[Row] = []
        for row, signature in zip(ordered, signatures, strict=True):
            target = self.target_key(row)
            near = index.find(signature, target)
            if near is None:
                index.add(row["_row"], signature, target)
                kept.append(row)
            else:
                self.remove("near_duplicate", row, f"nearly the training row {texts[near]}")
        return kept

    # -- findings --------------------------------------------------------------------------------------

    def measure(self, snapshot: Snapshot, frozen: list[Row]) -> dict[str, Any]:
        """What the checks judge, measured on the rows that are left."""
        train = [self.input_text(row) for row in snapshot.train]
        evaluation = [self.input_text(row) for row in snapshot.evaluation]
        held_out = {fold(text) for text in evaluation}
        group = self.spec.dataset.group_by
        groups = {row[group] for row in snapshot.evaluation if row[group]} if group else set()
        measured: dict[str, Any] = {
            "leaks": {
                "exact": sum(fold(text) in held_out for text in train),
                "near": count_leaks(train, evaluation, self.spec.dataset.near_duplicate),
                "group": sum(row[group] in groups for row in snapshot.train) if group else 0,
            },
            "conflicting_inputs": self.conflicts,
            "kept_from_parent": len(frozen),
            "segments": {
                column: self._counts(snapshot, lambda row, column=column: row[column])
                for column in self.spec.evaluation.segments
            },
        }
        if self.without_group:
            measured["kept_without_group"] = self.without_group
        if self.spec.evaluation.task == "classification":
            measured["classes"] = self._counts(snapshot, self.target_text)
        return measured

    @staticmethod
    def _counts(snapshot: Snapshot, value: Any) -> dict[str, dict[str, int]]:
        sides = {
            "train": Counter(value(row) for row in snapshot.train),
            "evaluation": Counter(value(row) for row in snapshot.evaluation),
        }
        total = sides["train"] + sides["evaluation"]
        # the largest first; a column of names has too many values to show
        names = sorted(total, key=lambda name: (-total[name], name))[:50]
        return {name: {side: counts[name] for side, counts in sides.items()} for name in names}


def _without(row: Row, *notes: str) -> Row:
    return {name: text for name, text in row.items() if name not in notes}


def _short(text: str, length: int = 120) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1]}…"
