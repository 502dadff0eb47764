"""Home commands and the intent call that each one means, sampled from a `home-assistant-intents` release.

A release is a set of sentence templates per language, written by the Home Assistant community: a template
such as `<turn> on [<the>] {name} <in> [<the>] {area}` stands for thousands of sentences. `utterances` walks
through the templates at random, fills in the areas, devices and list items of `words/<language>.json`, and
keeps what a person would say: the word lists also narrow some rules of the release (never widen them), and
drop sentences whose article or preposition is wrong. So the release's grammar understands every utterance.

Templates are skipped when they need what the utterance does not carry (the room of the microphone).
"""

import json
import math
import random
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from hassil.expression import (
    Alternative,
    Expression,
    Group,
    ListReference,
    Permutation,
    RuleReference,
    TextChunk,
)
from hassil.intents import Intents, SlotList, TextSlotList, TextSlotValue
from hassil.parse_expression import parse_sentence
from hassil.recognize import recognize, recognize_all
from hassil.sample import sample_expression

from ml_assets.downloads import wheel
from ml_assets.settings import Settings

INTENTS = (
    "TurnOn",
    "TurnOff",
    "LightSet",
    "SetPosition",
    "ClimateSetTemperature",
    "ClimateGetTemperature",
    "StartTimer",
    "CancelTimer",
    "ShoppingListAddItem",
    "ListAddItem",
    "SetVolume",
    "Broadcast",
)
LANGUAGES = {"en": 0.7, "de": 0.3}

# order of the slots in a call; the rest follows by name
SLOTS = ("item", "name", "area", "floor", "domain", "device_class", "hours", "minutes", "seconds")
# a command inside a command ("turn off the lights in 5 minutes") is left out: its target would be free text
NESTED = "conversation_command"
# what people ask for, within the release's ranges: values for each list
NUMBERS: dict[str, Sequence[float]] = {
    "temperature": [*range(16, 26), 18.5, 20.5, 21.5, 22.5],
    "color_temperature": range(2000, 6600, 100),
    "timer_seconds": [10, 15, 20, 30, 40, 45, 50, 90],
    "timer_minutes": [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 18, 20, 25, 30, 35, 40, 45, 50, 60, 75, 90],
    "timer_hours": [1, 2, 3, 4, 5, 6, 8, 10, 12],
}
# "2 hours and 75 minutes" is nobody's way to say it
CARRIES = (("minutes", "hours"), ("seconds", "minutes"), ("seconds", "hours"))
TRIES = 400


@dataclass
class Slot:
    """A filled-in list: what was said, what it means, and the word's own grammar."""

    name: str
    text: str
    value: Any
    word: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Mark:
    """A place whose word depends on the slot or noun that follows: 'in', 'article' or 'from'."""

    kind: str


class Unspoken(Exception):
    """A random walk came out as something that nobody says; the caller walks again."""


def utterances(
    release: str = "2026.10.27",
    rows: int = 2000,
    seed: int = 0,
    languages: Sequence[str] | dict[str, float] | None = None,
    intents: Sequence[str] | None = None,
    path: str | None = None,
    words: str | None = None,
) -> list[dict[str, str]]:
    """Sample `rows` different utterances.

    Args:
        release: version of the `home-assistant-intents` package.
        rows: how many. More rows with the same seed start with the same ones.
        seed: of the random walk. Same arguments, same rows, on every machine.
        languages: names (equal shares) or shares by name; default 70 % `en`, 30 % `de`.
        intents: short names such as `TurnOn`; default: `INTENTS`, as far as the release has them.
        path: a wheel file to read instead of downloading the release.
        words: a folder of word lists, `<language>.json`, instead of those beside this file.

    Returns rows with `utterance`, `call` (compact JSON: `intent`, then the slots in a fixed order), `intent`,
    `language` and `template` (id of the template, the same in every release that has it).

    Raises ValueError when the release has no such intent or language, there are no words for a language, or
    the templates give fewer different utterances than asked for.
    """
    shares = languages or LANGUAGES
    if isinstance(shares, str):
        raise ValueError(f"languages {shares!r}: expected a list of names, or shares by name")
    if not isinstance(shares, dict):
        shares = dict.fromkeys(shares, 1.0)
    for name, portion in shares.items():
        if not 0 < portion < math.inf:
            raise ValueError(f"languages: {name!r} has the share {portion}; expected a number above 0")
    file = Path(path) if path else wheel(f"home-assistant-intents=={release}", Settings.from_env())
    folder = Path(words) if words else Path(__file__).parent / "words"
    streams = {
        language: _interleave(_Grammar(file, language, folder), intents, f"{release} {seed} {language}")
        for language in shares
    }
    found: list[dict[str, str]] = []
    given = dict.fromkeys(shares, 0)
    while len(found) < rows:
        # the language that is furthest behind its share is next
        language = min(shares, key=lambda name: (given[name] + 1) / shares[name])
        row = next(streams[language], None)
        if row is None:
            raise ValueError(
                f"home-assistant-intents {release}: {rows} rows asked for, but {language!r} gives only "
                f"{given[language]} different utterances of these intents"
            )
        given[language] += 1
        found.append(row)
    return found


def same_call(
    rows: Sequence[Mapping[str, str]], release: str, path: str | None = None, words: str | None = None
) -> list[bool | None]:
    """Whether a release gives each row, of any release, the call that it has; None where it does not
    understand the utterance. What was right in one release can be wrong in another.

    Args as those of `utterances`; of a row `utterance`, `call` and `language` are read. Raises as it does.
    """
    file = Path(path) if path else wheel(f"home-assistant-intents=={release}", Settings.from_env())
    folder = Path(words) if words else Path(__file__).parent / "words"
    grammars = {row["language"]: _Grammar(file, row["language"], folder) for row in rows}
    agrees: list[bool | None] = []
    for row in rows:
        call = json.loads(row["call"])
        intent, slots = call.pop("intent"), _comparable(call)
        readings = grammars[row["language"]].readings(row["utterance"])
        same = any(name == intent and _comparable(found) == slots for name, found in readings)
        agrees.append(same if readings else None)
    return agrees


def _comparable(slots: Mapping[str, Any]) -> dict[str, Any]:
    """hassil gives numbers as floats, and texts as they were said."""
    return {
        name: value.strip().casefold() if isinstance(value, str) else value for name, value in slots.items()
    }


def _interleave(grammar: "_Grammar", intents: Sequence[str] | None, seed: str) -> Iterator[dict[str, str]]:
    """Different utterances, one intent after the other, until no intent has more."""
    names = [name for name in INTENTS if name in grammar.templates] if intents is None else list(intents)
    for name in names:
        if name not in grammar.templates:
            known = ", ".join(sorted(grammar.templates))
            raise ValueError(f"{grammar.source}: no intent {name!r}; it has {known}")
    # two intents can share a sentence: only the first is kept, else the same question has two right answers
    seen: set[str] = set()
    streams = [grammar.utterances(name, random.Random(f"{seed} {name}"), seen) for name in names]
    while streams:
        for stream in list(streams):
            row = next(stream, None)
            if row is None:
                streams.remove(stream)
            else:
                yield row


class _Grammar:
    """The templates, rules and lists of one release and language, with our words."""

    def __init__(self, file: Path, language: str, folder: Path) -> None:
        data = _read_release(file, language)
        words = folder / f"{language}.json"
        if not words.exists():
            known = ", ".join(sorted(path.stem for path in words.parent.glob("*.json")))
            raise ValueError(f"no words for language {language!r}; there are: {known}")
        self.source = f"{file.name}, language {language!r}"
        self.language = language
        self.words: dict[str, Any] = json.loads(words.read_text())
        self.lists: dict[str, Any] = data["lists"]
        self.skip_words: list[str] = data["skip_words"]
        self.given: dict[str, str] = data["expansion_rules"]
        self.rules = self.given | {
            name: self._narrowed(name, text, self.given)
            for name, text in self.words["rules"].items()
            if name in self.given
        }
        self.rejects = [re.compile(pattern) for pattern in self.words["reject"]]
        self._parsed: dict[str, Expression] = {}
        self.templates = {
            name.removeprefix("Hass"): templates
            for name, intent in data["intents"].items()
            if (templates := list(self._templates(name, intent["data"])))
        }

    def _narrowed(self, name: str, ours: str, given: dict[str, str]) -> str:
        """What our rule says, as far as the release's own rule understands it."""
        # places and articles are chosen by what follows; 'stt_fix' is what speech recognition makes of a
        # word, and ours is the word itself, which the release's sentences have as well
        if "{" in ours or "<" in ours or name.startswith("stt_fix"):
            return ours
        intents = Intents.from_dict(
            {
                "language": self.language,
                "intents": {"rule": {"data": [{"sentences": [f"<{name}>"]}]}},
                "lists": self.lists,
                "expansion_rules": given,
            }
        )
        said = list(sample_expression(parse_sentence(ours).expression))
        understood = [text for text in said if recognize(text, intents, language=self.language)]
        if len(understood) == len(said):
            return ours
        return f"({'|'.join(understood)})" if understood else given[name]

    def _templates(
        self, intent: str, blocks: list[dict[str, Any]]
    ) -> Iterator[tuple[dict[str, Any], list[str]]]:
        """Blocks that an utterance alone can mean, each with the fixed slots that tell it from the others."""
        fixed = [block.get("slots", {}) for block in blocks]

        def says_nothing(name: str, value: Any) -> bool:
            """Whether a slot is the same in every block of the intent. Domain and 'all' follow from the rest,
            so for these the blocks that have it count."""
            found = [other.get(name) for other in fixed]
            if name == "domain" or value == "all":
                found = [one for one in found if one is not None]
            return all(one == value for one in found)

        for block in blocks:
            needs = block.get("requires_context", {})
            if set(needs) - {"domain"} or block.get("metadata", {}).get("slot_combination", "").startswith(
                "command"
            ):
                continue
            slots = {
                name: value for name, value in block.get("slots", {}).items() if not says_nothing(name, value)
            }
            domains = needs.get("domain")
            yield (
                {
                    "intent": intent,
                    "slots": slots,
                    "domains": [domains] if isinstance(domains, str) else domains,
                    "excluded": block.get("excludes_context", {}).get("domain", []),
                    "rules": block.get("expansion_rules", {}),
                },
                block["sentences"],
            )

    def utterances(self, intent: str, chance: random.Random, seen: set[str]) -> Iterator[dict[str, str]]:
        """Different utterances of one intent, until `TRIES` walks in a row bring nothing new."""
        blocks = self.templates[intent]
        # every filled-in list makes a sentence longer and rarer: "1 hour 5 minutes and 3 seconds"
        weights = [0.4 ** max(0, block_sentences[1][0].count("{") - 1) for block_sentences in blocks]
        failures = 0
        while failures < TRIES:
            block, sentences = chance.choices(blocks, weights)[0]
            sentence = chance.choice(sentences)
            failures += 1
            try:
                text, slots = self._say(sentence, block, chance)
            except Unspoken:
                continue
            if text.casefold() in seen:
                continue
            seen.add(text.casefold())
            failures = 0
            # next to a slot, "please" could be a part of it
            ends = any(text.startswith(str(value)) or text.endswith(str(value)) for value in slots.values())
            if chance.random() < 0.15 and not ends and not re.search(self.words["question"], text):
                text = chance.choice(self.words["courtesy"]).format(text)
            yield {
                "utterance": text,
                "call": _call(intent, block["slots"] | slots),
                "intent": intent,
                "language": self.language,
                "template": f"{intent}-{sha256(sentence.encode()).hexdigest()[:8]}",
            }

    def readings(self, text: str) -> list[tuple[str, dict[str, Any]]]:
        """Intent and slots of everything that a text can mean."""
        return [
            (result.intent.name, {name: entity.value for name, entity in result.entities.items()})
            for result in recognize_all(text, self._intents, slot_lists=self._slots, language=self.language)
        ]

    @cached_property
    def _intents(self) -> Intents:
        blocks = {
            intent: [
                {
                    "sentences": sentences,
                    "slots": block["slots"],
                    "expansion_rules": block["rules"],
                    "requires_context": {"domain": block["domains"]} if block["domains"] else {},
                    "excludes_context": {"domain": block["excluded"]} if block["excluded"] else {},
                }
                for block, sentences in templates
            ]
            for intent, templates in self.templates.items()
        }
        return Intents.from_dict(
            {
                "language": self.language,
                "intents": {intent: {"data": data} for intent, data in blocks.items()},
                "lists": self.lists,
                "expansion_rules": self.given,
                "skip_words": self.skip_words,
            }
        )

    @cached_property
    def _slots(self) -> dict[str, SlotList]:
        def text(word: Any) -> str:
            return word if isinstance(word, str) else word["text"]

        lists = self.words["lists"]
        found: dict[str, SlotList] = {
            name: TextSlotList.from_strings(map(text, lists[name]), name=name) for name in ("area", "floor")
        }
        names = [
            TextSlotValue(TextChunk(text(word)), text(word), {"domain": key.removeprefix("name/")})
            for key in lists
            if key.startswith("name/")
            for word in lists[key]
        ]
        return found | {"name": TextSlotList(name="name", values=names)}

    # -- one walk --------------------------------------------------------------------------------------

    def _say(self, sentence: str, block: dict[str, Any], chance: random.Random) -> tuple[str, dict[str, Any]]:
        pieces = list(self._walk(self._parse(sentence), block, chance))
        slots = [piece for piece in pieces if isinstance(piece, Slot)]
        if len({slot.name for slot in slots}) < len(slots) or any(slot.name == NESTED for slot in slots):
            raise Unspoken
        text = shape = ""
        for index, piece in enumerate(pieces):
            if isinstance(piece, Mark):
                text, shape = _join(text, self._resolve(piece, text, pieces[index + 1 :])), _join(shape, "")
            elif isinstance(piece, Slot):
                self._check_place(piece, text)
                text, shape = text + piece.text, shape + f"{{{piece.name}}}"
            else:
                text, shape = text + piece, shape + piece
        text, shape = (" ".join(part.split()) for part in (text, shape))
        literal = re.sub(r"\{\w+\}|\b(the|my|our|to)\b|[%°]", " ", shape)
        text = self._polish(text)
        if not literal.strip() or any(p.search(shape) or p.search(text) for p in self.rejects):
            raise Unspoken
        values = {slot.name: slot.value for slot in slots}
        if any(small in values and big in values and values[small] > 59 for small, big in CARRIES):
            raise Unspoken
        return text, values

    def _parse(self, text: str) -> Expression:
        if text not in self._parsed:
            self._parsed[text] = parse_sentence(text).expression
        return self._parsed[text]

    def _walk(
        self, item: Expression, block: dict[str, Any], chance: random.Random
    ) -> Iterator["str | Slot | Mark"]:
        if isinstance(item, TextChunk):
            yield item.original_text
        elif isinstance(item, ListReference):
            yield from self._fill(item, block, chance)
        elif isinstance(item, RuleReference):
            rule = block["rules"].get(item.rule_name) or self.rules.get(item.rule_name)
            if rule is None:
                raise ValueError(f"{self.source}: a template uses the unknown rule <{item.rule_name}>")
            yield from self._walk(self._parse(rule), block, chance)
        elif isinstance(item, Alternative):
            if item.is_optional and _is_article(item) and chance.random() < 0.7:
                choice: Expression = item.items[0]  # people seldom drop an article
            else:
                choice = chance.choice(item.items)
            yield from self._walk(choice, block, chance)
        elif isinstance(item, Permutation):
            for part in chance.sample(item.items, len(item.items)):
                yield from self._walk(part, block, chance)
        elif isinstance(item, Group):
            for part in item.items:
                yield from self._walk(part, block, chance)
        else:
            raise TypeError(f"{self.source}: unexpected {item!r} in a template")

    def _fill(
        self, item: ListReference, block: dict[str, Any], chance: random.Random
    ) -> Iterator["str | Slot | Mark"]:
        list_name, _, form = item.list_name.partition("/")
        if not list_name:
            yield Mark(form)
            return
        slot = item.slot_name.partition("/")[0]
        values = self.lists.get(list_name, {})
        if list_name == "name":
            word = chance.choice(self._names(block))
        elif list_name in self.words["lists"]:
            word = chance.choice(self.words["lists"][list_name])
        elif "range" in values:
            yield self._number(list_name, slot, values["range"], chance)
            return
        elif "values" in values:
            yield from self._value(list_name, slot, values["values"], block, chance)
            return
        else:
            raise Unspoken  # a list of the release that we have no words for
        word = {"text": word} if isinstance(word, str) else word
        if form == "in":
            yield f"{word['in']} "
        yield Slot(slot, word["text"], word["text"], word)

    def _names(self, block: dict[str, Any]) -> list[Any]:
        """Devices of the domains that the block is about."""
        lists = self.words["lists"]
        domains = [key.partition("/")[2] for key in lists if key.startswith("name/")]
        if block["intent"] == "HassLightSet":  # old releases do not say so
            wanted = ["light"]
        elif block["domains"] is not None:
            wanted = [domain for domain in domains if domain in block["domains"]]
        else:
            wanted = [
                domain
                for domain in domains
                if domain in ("light", "switch", "fan", "media_player", "cover")
                and domain not in block["excluded"]
            ]
        if not wanted:
            raise Unspoken
        return [word for domain in wanted for word in lists[f"name/{domain}"]]

    def _number(self, name: str, slot: str, span: dict[str, Any], chance: random.Random) -> Slot:
        low, high = span["from"], span["to"]
        choices = NUMBERS.get(name) or range(5, 101, 5)
        number = chance.choice([value for value in choices if low <= value <= high] or [low])
        text = str(number).replace(".", "," if self.language == "de" else ".")
        return Slot(slot, text, number * span.get("multiplier", 1))

    def _value(
        self, name: str, slot: str, values: list[Any], block: dict[str, Any], chance: random.Random
    ) -> Iterator["str | Slot | Mark"]:
        choice = chance.choice(values)
        if isinstance(choice, str):
            choice = {"in": choice, "out": choice}
        pieces = list(self._walk(self._parse(str(choice["in"])), block, chance))
        text = "".join(piece for piece in pieces if isinstance(piece, str))
        only = self.words.get("only", {}).get(name)
        if only is not None and text not in only:
            raise Unspoken
        yield Slot(slot, text, choice["out"], {"g": only[text]} if only else {})

    # -- grammar ---------------------------------------------------------------------------------------

    def _check_place(self, slot: Slot, before: str) -> None:
        """English: in the kitchen, but on the patio; 'turn on the kitchen lights' is not a place."""
        match = re.search(r"(\w*) ?\b(in|on)( the| my)?$", " ".join(before.split()))
        if match is None or slot.name not in ("area", "floor") or match[1] in ("turn", "switch"):
            return
        expected = slot.word.get("in", "in the")
        if not expected.startswith(match[2]) or ("the" in expected and not match[3] and slot.name == "floor"):
            raise Unspoken

    def _resolve(self, mark: Mark, before: str, after: list["str | Slot | Mark"]) -> str:
        """The article (and 'von') that suits the noun after it, in German: gender from the word lists."""
        following = next((piece for piece in after if not isinstance(piece, str) or piece.strip()), None)
        if mark.kind == "from" and isinstance(following, Mark):
            return "von"
        if isinstance(following, Slot):
            gender = following.word.get("g")
        elif isinstance(following, str):
            gender = self.words["nouns"].get(following.split()[0])
        else:
            gender = None
        if gender is None:
            raise Unspoken
        if mark.kind == "from":
            if gender == "f":  # 'von der': its article would be a mark of its own
                raise Unspoken
            return {"m": "vom", "n": "vom", "p": "von"}[gender]
        words = before.split()
        previous = words[-1] if words else ""
        if previous in ("der", "die", "das", "des", "dem", "den", "vom", "zum", "im", "am", "beim"):
            raise Unspoken
        if any(word in self.words["nominative"] for word in words):
            return {"f": "die", "m": "der", "n": "das", "p": "die"}[gender]
        if previous in self.words["dative"]:
            return {"f": "der", "m": "dem", "n": "dem", "p": "den"}[gender]
        return {"f": "die", "m": "den", "n": "das", "p": "die"}[gender]

    def _polish(self, text: str) -> str:
        """Capitals, plurals and a/an as they are written. The release understands both forms."""
        text = re.sub(r"(?<=\d) (?=[%°])", "", text)
        text = re.sub(r"(?<=[a-zäöüß])[A-ZÄÖÜ]", lambda match: match[0].lower(), text)
        for noun in self.words.get("nouns", ()):
            text = re.sub(rf"\b{noun.lower()}\b", noun, text)
        for pattern, replacement in self.words["fixes"]:
            text = re.sub(pattern, replacement, text)
        return text


def _call(intent: str, slots: dict[str, Any]) -> str:
    order = [name for name in SLOTS if name in slots]
    order += sorted(name for name in slots if name not in SLOTS)
    return json.dumps(
        {"intent": intent} | {name: slots[name] for name in order}, ensure_ascii=False, separators=(",", ":")
    )


def _is_article(item: Alternative) -> bool:
    """Whether an optional is nothing but an article: `[<the>]`, `[the|my]`."""
    parts: list[Expression] = list(item.items[:-1])
    while parts and all(isinstance(part, Group) for part in parts):
        parts = [inner for part in parts if isinstance(part, Group) for inner in part.items]
    names = [
        part.rule_name
        if isinstance(part, RuleReference)
        else part.text.strip()
        if isinstance(part, TextChunk)
        else "?"
        for part in parts
    ]
    return bool(names) and set(names) <= {
        "the",
        "my",
        "a",
        "an",
        "einen",
        "artikel_bestimmt",
        "die",
        "der",
        "das",
        "den",
        "",
    }


def _join(text: str, word: str) -> str:
    return f"{text}{word}" if not text or text.endswith(" ") else f"{text} {word}"


def _read_release(file: Path, language: str) -> dict[str, Any]:
    """Templates of one language: one file per language today, one per domain and language in old releases."""
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if re.search(rf"/data/(\w+/)?{language}\.json$", name)]
        if not names:
            known = {
                Path(name).stem for name in archive.namelist() if "/data/" in name and name.endswith(".json")
            }
            raise ValueError(f"{file.name}: no language {language!r}; it has {', '.join(sorted(known))}")
        parts = [json.loads(archive.read(name)) for name in sorted(names)]
    merged: dict[str, Any] = {"intents": {}, "lists": {}, "expansion_rules": {}}
    merged["skip_words"] = sorted({word for part in parts for word in part.get("skip_words", [])})
    for part in parts:
        merged["lists"] |= part.get("lists", {})
        merged["expansion_rules"] |= part.get("expansion_rules", {})
        for name, intent in part.get("intents", {}).items():
            merged["intents"].setdefault(name, {"data": []})["data"] += intent["data"]
    return merged
