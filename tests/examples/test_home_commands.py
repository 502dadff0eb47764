import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from hassil.expression import TextChunk
from hassil.intents import Intents, TextSlotList, TextSlotValue
from hassil.recognize import recognize_all

from examples.home_commands import source
from examples.home_commands.source import INTENTS, utterances

RELEASE = "home-assistant-intents==2026.10.27"
OLD = "home-assistant-intents==2023.9.22"


@pytest.fixture(scope="module")
def rows(packages) -> list[dict[str, str]]:
    return utterances(rows=1200, path=packages[RELEASE])


def test_balanced_different_and_short(rows):
    assert [list(row) for row in rows[:1]] == [["utterance", "call", "intent", "language", "template"]]
    assert len({row["utterance"].casefold() for row in rows}) == len(rows) == 1200
    intents = Counter(row["intent"] for row in rows)
    assert set(intents) == set(INTENTS)
    assert min(intents.values()) >= 95
    languages = Counter(row["language"] for row in rows)
    assert languages == {"en": 840, "de": 360}
    assert len({row["template"] for row in rows}) > 200
    for row in rows:
        call = json.loads(row["call"])
        assert next(iter(call)) == "intent"
        assert call["intent"] == row["intent"]
        assert json.dumps(call, ensure_ascii=False, separators=(",", ":")) == row["call"]
        assert len(row["call"]) <= 120


def test_values_are_what_was_said(rows):
    free = ("name", "area", "floor", "item", "message")
    for row in rows:
        call = json.loads(row["call"])
        for slot in set(free) & set(call):
            assert call[slot] in row["utterance"], row


def test_written_as_people_write(rows):
    for row in rows:
        text = row["utterance"]
        assert text == " ".join(text.split())
        assert not set("{}<>[]|()") & set(text), text
        if row["language"] == "en":
            assert " the the " not in text
            assert " an timer" not in text
        else:
            for wrong in (
                "EinkaufsListe",
                "im in der",
                "vom die",
                "in Wohnzimmer",
                "der Wohnzimmer",
                "im Küche",
            ):
                assert wrong not in text, text


@pytest.mark.parametrize("language", ["en", "de"])
def test_the_release_understands_every_utterance_and_means_the_same_call(packages, language):
    """Home Assistant's own recognizer, with the release's full grammar, is the judge."""
    with zipfile.ZipFile(packages[RELEASE]) as archive:
        grammar = json.loads(archive.read(f"home_assistant_intents/data/{language}.json"))
    words = json.loads((Path(source.__file__).parent / "words" / f"{language}.json").read_text())["lists"]

    def text(word) -> str:
        return word if isinstance(word, str) else word["text"]

    names = [(text(word), key[5:]) for key in words if key.startswith("name/") for word in words[key]]
    lists = {name: TextSlotList.from_strings(map(text, words[name]), name=name) for name in ("area", "floor")}
    lists["name"] = TextSlotList(
        name="name",
        values=[TextSlotValue(TextChunk(name), name, {"domain": domain}) for name, domain in names],
    )
    intents = Intents.from_dict(grammar)

    def same(one, other) -> bool:
        if isinstance(one, str) or isinstance(other, str):
            return str(one).strip().casefold() == str(other).strip().casefold()
        return one == other

    for row in utterances(rows=150, seed=3, languages=[language], path=packages[RELEASE]):
        call = json.loads(row["call"])
        intent = f"Hass{call.pop('intent')}"
        readings = [
            (result.intent.name, {name: entity.value for name, entity in result.entities.items()})
            for result in recognize_all(row["utterance"], intents, slot_lists=lists, language=language)
        ]
        assert any(
            name == intent
            # a domain that is the same in all of an intent's templates is left out of the call
            and set(slots) - {"domain"} <= set(call) <= set(slots)
            and all(same(value, slots[slot]) for slot, value in call.items())
            for name, slots in readings
        ), (row, readings)


def test_no_sentence_that_needs_the_microphones_room(rows):
    for row in rows:
        call = json.loads(row["call"])
        if row["intent"] in ("LightSet", "SetVolume", "ClimateGetTemperature", "SetPosition"):
            assert {"name", "area", "floor"} & set(call), row


def test_deterministic_across_processes_and_stable_as_it_grows(packages, rows):
    code = (
        "import json, sys; from examples.home_commands.source import utterances;"
        "sys.stdout.write(json.dumps(utterances(rows=300, path=sys.argv[1])))"
    )
    results = {
        hashlib.sha256(
            subprocess.run(
                [sys.executable, "-c", code, packages[RELEASE]],
                env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": "."},
                capture_output=True,
                check=True,
            ).stdout
        ).hexdigest()
        for seed in ("1", "2")
    }
    assert results == {hashlib.sha256(json.dumps(rows[:300]).encode()).hexdigest()}
    assert utterances(rows=300, seed=1, path=packages[RELEASE]) != rows[:300]


def test_old_release_has_another_layout(packages):
    rows = utterances(rows=100, path=packages[OLD])
    assert {row["intent"] for row in rows} == {"TurnOn", "TurnOff", "LightSet", "ShoppingListAddItem"}
    assert Counter(row["language"] for row in rows) == {"en": 70, "de": 30}


def test_mistakes_are_named(packages):
    with pytest.raises(ValueError, match=r"no intent 'Dance'; it has .*TurnOn"):
        utterances(rows=10, intents=["Dance"], path=packages[RELEASE])
    with pytest.raises(ValueError, match=r"no language 'xx'; it has .*\ben\b"):
        utterances(rows=10, languages=["xx"], path=packages[RELEASE])
    with pytest.raises(ValueError, match="no words for language 'fr'; there are: de, en"):
        utterances(rows=10, languages=["fr"], path=packages[RELEASE])
    with pytest.raises(ValueError, match="100000 rows asked for, but 'en' gives only"):
        utterances(rows=100_000, languages=["en"], intents=["Broadcast"], path=packages[RELEASE])
