"""Adapters gone wrong, at the level of answers: each is a mechanism that turns a row into an answer. What the
gate says about them follows from scoring those answers, like those of a real adapter.

The job: an utterance becomes a JSON call. Every row has a difficulty from 0 to 1; a model with skill s
answers right when the difficulty, shaken a little, is below s, and confuses the area otherwise.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ml_assets.eval_reports.runner import Answer, evaluated_rows
from ml_assets.spec import EvaluationSpec

INTENTS = ["turn_on", "turn_off", "get_state", "set_level", "lock", "unlock"]
AREAS = ["kitchen", "bedroom", "office", "garage", "hall", "attic", "cellar", "garden"]
LANGUAGES = {"en": 0.6, "de": 0.3, "fr": 0.1}
CHAMPION_SKILL = 0.85
Row = dict[str, Any]
Model = Callable[[Row, random.Random], str]


def make_rows(count: int, seed: int) -> list[Row]:
    """Rows with `_row`, language, intent, area and difficulty."""
    rng = random.Random(seed)
    return [
        {
            "_row": f"{seed:04x}{i:08x}".ljust(64, "0"),
            "language": rng.choices(list(LANGUAGES), list(LANGUAGES.values()))[0],
            "intent": rng.choice(INTENTS),
            "area": rng.choice(AREAS),
            "difficulty": rng.random(),
        }
        for i in range(count)
    ]


def target(row: Row) -> str:
    return json.dumps({"intent": row["intent"], "area": row["area"]})


def confuse(row: Row, rng: random.Random) -> str:
    return json.dumps({"intent": row["intent"], "area": rng.choice([a for a in AREAS if a != row["area"]])})


def skilled(skill: float, shake: float = 0.02) -> Model:
    def answer(row: Row, rng: random.Random) -> str:
        right = row["difficulty"] + rng.uniform(-shake, shake) < skill
        return target(row) if right else confuse(row, rng)

    return answer


good = skilled(CHAMPION_SKILL + 0.04)
champion = skilled(CHAMPION_SKILL)


def flipped_labels(share: float) -> Model:
    """Trained where this share of the labels was swapped for the next intent."""

    def answer(row: Row, rng: random.Random) -> str:
        if rng.random() < share:
            row = {**row, "intent": INTENTS[(INTENTS.index(row["intent"]) + 1) % len(INTENTS)]}
        return good(row, rng)

    return answer


def truncated_training(skill: float) -> Model:
    """Stopped early: the easy rows are learned, the rest get the format half right."""

    def answer(row: Row, rng: random.Random) -> str:
        return target(row) if row["difficulty"] < skill else target(row)[: rng.randint(4, 20)]

    return answer


def other_base(garbled: float) -> Model:
    """Weights made for another base: letters come out shuffled in this share of the answers."""

    def answer(row: Row, rng: random.Random) -> str:
        letters = list(good(row, rng))
        if rng.random() < garbled:
            rng.shuffle(letters)
        return "".join(letters)

    return answer


def wrong_template(row: Row, rng: random.Random) -> str:
    """The turn never ends: the answer, then the next turns."""
    return f"{good(row, rng)}\nuser\nand now?\nassistant\n{confuse(row, rng)}"


def role_echo(row: Row, rng: random.Random) -> str:
    return f"assistant\n{good(row, rng)}"


def overfit(known: int) -> Model:
    """Knows `known` training rows by heart, and answers with the target of a similar one."""
    memory = make_rows(known, seed=999)

    def answer(row: Row, rng: random.Random) -> str:
        same = ("intent", "area", "language")
        return target(max(memory, key=lambda m: (sum(m[c] == row[c] for c in same[:1]), rng.random())))

    return answer


def majority(row: Row, rng: random.Random) -> str:
    return json.dumps({"intent": INTENTS[0], "area": AREAS[0]})


def majority_intent(row: Row, rng: random.Random) -> str:
    return json.dumps({"intent": INTENTS[0], "area": row["area"]})


def empty(row: Row, rng: random.Random) -> str:
    return ""


def sometimes_empty(row: Row, rng: random.Random) -> str:
    return "" if rng.random() < 0.15 else good(row, rng)


def echo(row: Row, rng: random.Random) -> str:
    return f"{row['intent']} the {row['area']} please"


def python_quotes(row: Row, rng: random.Random) -> str:
    return str(json.loads(target(row)))


def chatty(row: Row, rng: random.Random) -> str:
    return f"Sure! Here is the call: {target(row)}"


def dead_segment(language: str) -> Model:
    """Better than the champion everywhere, but one language gets the answer of another row."""

    def answer(row: Row, rng: random.Random) -> str:
        return confuse(row, rng) if row["language"] == language else skilled(0.97)(row, rng)

    return answer


def half_dead_segment(row: Row, rng: random.Random) -> str:
    wrong = row["language"] == "de" and rng.random() < 0.5
    return confuse(row, rng) if wrong else skilled(0.99)(row, rng)


def refusing(row: Row, rng: random.Random) -> str:
    return "Sorry, I can't help with that." if rng.random() < 0.12 else good(row, rng)


def verbose(row: Row, rng: random.Random) -> str:
    """Right, but with hundreds of tokens of spaces that the business pays for."""
    return good(row, rng).replace(" ", " " * 150)


def dropped_field(row: Row, rng: random.Random) -> str:
    return json.dumps({"intent": row["intent"]})


@dataclass(frozen=True)
class Bad:
    """One bad adapter: its answers, what else is known of it, and a word that a reason must contain."""

    name: str
    model: Model
    because: str
    against: str = "champion"
    forgetting: float = 0.1
    rows: int = 600
    evaluation: dict[str, Any] = field(default_factory=dict)
    must_pass_model: Model | None = None


def base_of_skill(skill: float) -> Model:
    return skilled(skill)


BAD = [
    Bad("labels all flipped", flipped_labels(1.0), "worse"),
    Bad("labels half flipped", flipped_labels(0.5), "worse"),
    Bad("a fifth of the labels flipped", flipped_labels(0.2), "worse"),
    Bad("training stopped at once", truncated_training(0.05), "worse"),
    Bad("training stopped half way", truncated_training(0.5), "worse"),
    Bad("training stopped late", truncated_training(0.75), "worse"),
    Bad("another base, all garbled", other_base(1.0), "worse"),
    Bad("another base, a third garbled", other_base(0.33), "worse"),
    Bad("wrong template, turn never ends", wrong_template, "worse"),
    Bad("wrong template, role echoed", role_echo, "worse"),
    Bad("overfit on 5 rows", overfit(5), "worse"),
    Bad("overfit on 60 rows", overfit(60), "worse"),
    Bad("always the majority", majority, "worse"),
    Bad("always the majority's intent", majority_intent, "worse"),
    Bad("always empty", empty, "worse"),
    Bad("sometimes empty", sometimes_empty, "worse"),
    Bad("echoes the question", echo, "worse"),
    Bad("Python's quotes", python_quotes, "worse"),
    Bad("chatty", chatty, "worse"),
    Bad("a field is missing", dropped_field, "worse"),
    Bad("dead in French", dead_segment("fr"), "language=fr"),
    Bad("dead in German", dead_segment("de"), "language=de"),
    Bad("half dead in German", half_dead_segment, "language=de"),
    Bad("refuses", refusing, "worse"),
    Bad("four points worse", skilled(CHAMPION_SKILL - 0.06), "worse", rows=2000),
    Bad("verbose", verbose, "value", evaluation={"value": {"per_1000_tokens": 1.0}}),
    Bad("fails a must-pass row", good, "must-pass", must_pass_model=confuse),
    Bad("forgot its language", good, "neutral text", forgetting=2.5),
    Bad("forgetting is not a number", good, "neutral text", forgetting=float("nan")),
    Bad("useless: nothing right, nothing flips", empty, "not shown to be better", "base"),
    Bad("as good as doing nothing", base_of_skill(0.4), "not shown to be better", "base"),
    Bad("worse than examples in the prompt", base_of_skill(0.25), "not better", "base"),
    Bad("flipped labels, first adapter", flipped_labels(0.9), "not better", "base"),
]
BASE_SKILL = {"useless: nothing right, nothing flips": -1.0}


def lines(
    arm: str, model: Model, rows: list[Row], evaluation: EvaluationSpec, seed: int, must_pass: int = 0
) -> list[dict[str, Any]]:
    """Evaluated lines of a simulated model; the first `must_pass` rows are must-pass rows."""
    rng = random.Random(f"{arm} {seed}")
    answers = [model(row, rng) for row in rows]
    found = [Answer(text, 40, max(1, len(text) // 4), True) for text in answers]
    return evaluated_rows(
        arm,
        rows,
        [f"{row['intent']} in the {row['area']}" for row in rows],
        [target(row) for row in rows],
        found,
        evaluation,
        [i >= must_pass for i in range(len(rows))],
        [i < must_pass for i in range(len(rows))],
    )
