"""A request as a row: templates read the other way round."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from traffic_records import record, spec

from ml_assets.datasets.snapshot import normalize
from ml_assets.spec import template_columns
from ml_assets.traffic.rows import invert, row_of
from ml_assets.traffic.writer import CUT

COLUMNS = ["a", "b", "c"]


@st.composite
def templates(draw: st.DrawFn) -> str:
    names = draw(st.lists(st.sampled_from(COLUMNS), min_size=1, max_size=4))
    text = draw(st.sampled_from(["", "Q: ", "{{", "x "]))
    for name in names:
        text += "{" + name + "}" + draw(st.sampled_from([" | ", "\n--\n", "}}, ", " and "]))
    return text + draw(st.sampled_from(["", "end", " ?"]))


@given(templates(), st.lists(st.text("pqrs é\n", min_size=1).filter(str.strip), min_size=3, max_size=3))
def test_a_rendered_row_is_found_again(template: str, values: list[str]) -> None:
    row = {name: normalize(value) for name, value in zip(COLUMNS, values, strict=True)}
    named = {name: row[name] for name in template_columns(template)}
    text = template.format_map(row)
    found = invert(template, text)
    assert found is not None
    assert template.format_map(found).split() == text.split()
    if not any(word in value for word in ("|", "--", "and") for value in values):
        assert found == named


@given(templates(), st.text(max_size=40))
def test_what_is_found_renders_the_text(template: str, text: str) -> None:
    found = invert(template, text)
    assert found is None or normalize(template.format_map(found)) == normalize(text)


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        ("{a}", "", None),
        ("{a}{b}", "xy", None),
        ("{a} to {a}", "x to x", {"a": "x"}),
        ("{a} to {a}", "x to y", None),
        ("Order: {a}.", "order: x.", None),
        ("{a}:", "x:y:", {"a": "x:y"}),
        ('{{"k": "{a}"}}', '{"k": "v"}', {"a": "v"}),
    ],
)
def test_templates(template: str, text: str, expected: dict[str, str] | None) -> None:
    assert invert(template, text) == expected


def test_a_hostile_text_takes_no_time() -> None:
    start = time.perf_counter()
    assert invert("{a} {b} {c} {d} {e} {f}!", "x " * 30_000) is None
    assert time.perf_counter() - start < 1


COMMANDS = spec(
    prompt={"system": "Answer with JSON.", "user": "{utterance}", "target": "{call}"},
    evaluation={"task": "json", "segments": ["intent", "language", "slots"], "cluster": "template"},
)


def test_other_columns_come_from_metadata_and_the_answer() -> None:
    call = json.dumps({"intent": "HassTurnOn", "slots": {"name": "lamp"}, "language": "xx"})
    asked = record(asked=" light  on\n", metadata={"language": "de"}, answer=call)
    expected = {
        "utterance": "light  on",
        "call": call,
        "intent": "HassTurnOn",
        "language": "de",
        "slots": '{"name": "lamp"}',
        "template": "",
    }
    assert row_of(COMMANDS, asked) == expected
    right = '{"intent": "HassTurnOff"}'
    assert row_of(COMMANDS, asked, right) == expected | {"call": right, "intent": "HassTurnOff", "slots": ""}


def test_conversations_that_are_no_row() -> None:
    def messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
        return [{"role": role, "content": text} for role, text in turns]

    def row(*turns: tuple[str, str]) -> dict[str, str] | None:
        return row_of(COMMANDS, record(messages=messages(*turns)), "{}")

    assert row(("user", "on")) is not None
    assert row(("system", "Answer with JSON. "), ("user", "on")) is not None
    assert row(("system", "Be a pirate."), ("user", "on")) is None
    assert row(("user", "on"), ("assistant", "done"), ("user", "and off")) is None
    assert row(("user", "on" + CUT)) is None
    assert row(("system", "Answer with JSON.")) is None
    assert row_of(spec(), record(messages=messages(("system", "x"), ("user", "on"))), "a") is None


def test_columns_of_the_system_prompt_and_of_both_sides() -> None:
    made = spec(prompt={"system": "You speak {language}.", "user": "{text}", "target": "{text} is {label}"})
    asked = [{"role": "system", "content": "You speak French."}, {"role": "user", "content": "bleu"}]
    row = row_of(made, record(messages=asked), "bleu is blue")
    assert row == {"language": "French", "text": "bleu", "label": "blue"}
    assert row_of(made, record(messages=asked), "rouge is red") is None
    # what the model answered may have any form
    assert row_of(made, record(messages=asked, answer="?")) == row | {"label": ""}
    assert row_of(made, record(messages=asked, answer="rouge is red")) == row | {"label": ""}
