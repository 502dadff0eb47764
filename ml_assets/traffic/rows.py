"""From a request back to the columns of the dataset: the prompt's templates, read the other way round."""

import json
from collections.abc import Mapping
from string import Formatter

from ml_assets.datasets.snapshot import normalize
from ml_assets.spec import CustomizationSpec
from ml_assets.traffic.records import TrafficRecord
from ml_assets.traffic.writer import CUT


def row_of(
    spec: CustomizationSpec, record: TrafficRecord, right_answer: str | None = None
) -> dict[str, str] | None:
    """The row that a request would be, with every column that the customization reads.

    The columns of `prompt.user` (and of `prompt.system`, where the request brings a system message) are read
    from the conversation, those of `prompt.target` from `right_answer`, or, without one, from what was
    answered; they are "" where that does not have the template's form. Other columns come from the request's
    metadata, else from the top-level keys of the answer if it is a JSON object, else they are "".

    None when the conversation is not one question in the form of the template, when a text was too long to be
    stored whole, and when `right_answer` does not have the form of `prompt.target`.
    """
    asked = _question(spec, record.messages)
    if asked is None:
        return None
    answer = record.answer if right_answer is None else right_answer
    target = invert(spec.prompt.target, answer)
    if target is None and right_answer is not None:
        return None
    # what a column of the question says, it says in the answer, too
    if target and any(target[column] != asked[column] for column in target.keys() & asked.keys()):
        if right_answer is not None:
            return None
        target = None
    columns = {**(target or {}), **asked}
    notes = {**_json_keys(answer), **record.metadata}
    named = {*spec.prompt.columns()["target"]}
    return {
        column: columns[column] if column in columns else "" if column in named else _note(notes, column)
        for column in spec.columns()
    }


def invert(template: str, text: str) -> dict[str, str] | None:
    """{column: text} with which `template` gives `text`, white space around them aside; None when it can't.

    Of several readings the one in which the first columns are shortest. Takes time in proportion to the text,
    whatever it is. Columns that touch, without a letter between them, can't be told apart: None.
    """
    literals, names = [""], []
    for literal, name, _, _ in Formatter().parse(template):  # an escaped brace ends a part, too
        literals[-1] += literal
        if name is not None:
            names.append(name)
            literals.append("")
    if any(not literal for literal in literals[1:-1]):
        return None
    literals[0], literals[-1] = literals[0].lstrip(), literals[-1].rstrip()
    text = normalize(text)
    if not text.startswith(literals[0]):
        return None
    at = len(literals[0])
    found: dict[str, str] = {}
    for number, name in enumerate(names, 1):
        last = number == len(names)
        end = len(text) - len(literals[number]) if last else text.find(literals[number], at + 1)
        if end < at or not text.startswith(literals[number], end):
            return None
        value = normalize(text[at:end])
        if not value or found.setdefault(name, value) != value:
            return None
        at = end + len(literals[number])
    return found


def _question(spec: CustomizationSpec, messages: list[dict[str, str]]) -> dict[str, str] | None:
    """The columns of one question with its system message, if it has one."""
    if any(message["content"].endswith(CUT) for message in messages):
        return None
    said = {"system": "", "user": ""}
    for message in messages:
        if said.get(message["role"]) != "":  # an answer, or a second turn
            return None
        said[message["role"]] = message["content"]
    columns = invert(spec.prompt.user, said["user"])
    if columns is None or not said["system"]:
        return columns
    if spec.prompt.system is None:
        return None
    if not spec.prompt.columns()["system"]:
        plain = spec.prompt.system.format_map({})
        return columns if normalize(said["system"]) == normalize(plain) else None
    more = invert(spec.prompt.system, said["system"])
    if more is None or any(columns[name] != more[name] for name in columns.keys() & more.keys()):
        return None
    return more | columns


def _json_keys(answer: str) -> Mapping[str, object]:
    try:
        values = json.loads(answer)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _note(notes: Mapping[str, object], column: str) -> str:
    return normalize(notes.get(column))
