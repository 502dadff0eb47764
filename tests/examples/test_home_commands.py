import hashlib
import json
import os
import re
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
from examples.home_commands.source import INTENTS, same_call, utterances

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


@pytest.mark.parametrize("release", [RELEASE, OLD])
@pytest.mark.parametrize("language", ["en", "de"])
def test_the_release_understands_every_utterance_and_means_the_same_call(packages, language, release):
    """Home Assistant's own recognizer, with the release's full grammar, is the judge."""
    grammar = {"language": language} | source._read_release(Path(packages[release]), language)
    with zipfile.ZipFile(packages[release]) as archive:
        files = [name for name in archive.namelist() if name.endswith(f"/{language}.json")]
        parts = [json.loads(archive.read(name)) for name in files]
    grammar["skip_words"] = sorted({word for part in parts for word in part.get("skip_words", [])})
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

    for row in utterances(rows=250, seed=3, languages=[language], path=packages[release]):
        call = json.loads(row["call"])
        intent = f"Hass{call.pop('intent')}"
        readings = [
            (result.intent.name, {name: entity.value for name, entity in result.entities.items()})
            for result in recognize_all(row["utterance"], intents, slot_lists=lists, language=language)
        ]
        assert any(
            name == intent
            # what is the same in all of an intent's templates is left out of the call: its domain, or 'all'
            and {slot for slot, value in slots.items() if slot != "domain" and value != "all"} <= set(call)
            and set(call) <= set(slots)
            and all(same(value, slots[slot]) for slot, value in call.items())
            for name, slots in readings
        ), (row, readings)


@pytest.mark.parametrize("release", [RELEASE, OLD])
@pytest.mark.parametrize("language", ["en", "de"])
def test_a_release_gives_its_own_rows_their_call(packages, language, release):
    rows = utterances(rows=36, seed=4, languages=[language], path=packages[release])
    wrong = [row | {"call": row["call"].replace('"intent":"', '"intent":"No')} for row in rows[:12]]
    found = same_call([*rows, *wrong], release, path=packages[release])
    assert found == [True] * len(rows) + [False] * len(wrong)


def test_what_a_call_was_can_be_another_one_later(packages):
    def row(utterance: str, **call: str) -> dict[str, str]:
        text = json.dumps({"intent": "TurnOn"} | call, separators=(",", ":"))
        return {"utterance": utterance, "language": "en", "call": text}

    scene = row("activate the romance", name="romance", domain="scene")
    rows = [
        row("turn on the desk lamp", name="desk lamp"),
        scene,
        row("romance it, will you", name="romance"),
    ]
    assert same_call(rows, OLD, path=packages[OLD]) == [True, True, None]
    # scenes are told by their name alone since
    assert same_call(rows, RELEASE, path=packages[RELEASE]) == [True, False, None]


def test_a_slot_that_only_some_templates_have_is_part_of_the_call(packages):
    rows = utterances(rows=800, languages=["en"], path=packages[OLD])
    doors = [row for row in rows if row["utterance"].removesuffix(" please").endswith("open the garage door")]
    assert doors
    for row in doors:
        assert json.loads(row["call"])["device_class"] == "garage"


def test_an_old_release_is_asked_in_its_own_words(packages):
    texts = [row["utterance"] for row in utterances(rows=600, languages=["en"], path=packages[OLD])]
    assert any(text.startswith("set ") for text in texts)
    assert not any(re.search(r"\blamps\b|\bturn (up|down) the\b", text) for text in texts)


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
    with pytest.raises(ValueError, match="expected a list of names, or shares by name"):
        utterances(rows=10, languages="en", path=packages[RELEASE])  # type: ignore[arg-type]
    for share in (0, -1):
        with pytest.raises(ValueError, match=f"'de' has the share {share}; expected a number above 0"):
            utterances(rows=10, languages={"en": 1, "de": share}, path=packages[RELEASE])
    with pytest.raises(ValueError, match="no words for language 'fr'; there are: de, en"):
        utterances(rows=10, languages=["fr"], path=packages[RELEASE])
    with pytest.raises(ValueError, match="100000 rows asked for, but 'en' gives only"):
        utterances(rows=100_000, languages=["en"], intents=["Broadcast"], path=packages[RELEASE])
