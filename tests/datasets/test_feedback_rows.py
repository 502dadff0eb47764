"""Right answers of users in a dataset: which join, where they came from, and that a flood does not."""

import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from feedback_floods import DISGUISES, Said, poison
from hypothesis import given, settings
from hypothesis import strategies as st

from ml_assets.artifacts import ArtifactStore
from ml_assets.datasets.admission import _signature
from ml_assets.datasets.build import BuiltDataset, build_dataset
from ml_assets.datasets.duplicates import jaccard, shingles
from ml_assets.datasets.feedback import same_answer
from ml_assets.datasets.snapshot import load_manifest, load_rows
from ml_assets.settings import Settings
from ml_assets.spec import CustomizationSpec
from ml_assets.traffic.records import OPERATOR, Judged

VERBS = ["switch", "turn", "put", "bring", "move", "lift", "set", "make", "hold", "keep"]
THINGS = ["lamp", "door", "window", "curtain", "heater", "fan", "radio", "oven", "blind", "gate"]
PLACES = ["kitchen", "hall", "garden", "office", "cellar", "attic", "porch", "garage"]
LABELS = ["on", "off", "open", "shut"]


def spec(**changes: Any) -> CustomizationSpec:
    return CustomizationSpec(
        **{
            "name": "home",
            "source": {"kind": "jsonl", "path": "rows.jsonl"},
            "prompt": {"user": "{text}", "target": "{label}"},
            "base_models": ["base"],
            "evaluation": {"task": "classification", "segments": ["place"], "cluster": "kind"},
            "feedback": {"max_share_per_key": 1},
            **changes,
        }
    )


def source_rows(count: int = 400) -> list[dict[str, str]]:
    """Commands whose label does not depend on small changes: the verb decides."""
    rng = random.Random(0)
    rows = {}
    while len(rows) < count:
        verb, thing, place = rng.choice(VERBS), rng.choice(THINGS), rng.choice(PLACES)
        text = f"{verb} the {thing} in the {place} {rng.choice(['now', 'please', 'at once', 'tonight'])}"
        rows[text] = {"text": text, "label": LABELS[VERBS.index(verb) % 4], "place": place, "kind": verb}
    return list(rows.values())


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "artifacts"))


def build(
    folder: Path, store: ArtifactStore, said: Said | None = None, rows: Iterable[dict] = (), **changes: Any
) -> BuiltDataset:
    lines = "".join(f"{json.dumps(row)}\n" for row in rows or source_rows())
    (folder / "rows.jsonl").write_text(lines)
    judged: Sequence[Judged] = said.judged if said else ()
    return build_dataset(spec(**changes), folder, Settings.from_env(), store, judged=judged)


def rows_of(store: ArtifactStore, built: BuiltDataset) -> list[dict[str, str]]:
    directory = store.open(built.ref)
    return [row for side in ("train", "evaluation") for row in load_rows(directory, side)]


def joined(store: ArtifactStore, built: BuiltDataset) -> list[dict[str, str]]:
    return [row for row in rows_of(store, built) if row.get("_origin", "source") != "source"]


NEW = [f"{word} my {word} quietly for {n} hours" for n, word in enumerate(
    ["piano", "toothbrush", "hamster", "xylophone", "umbrella", "binoculars", "quilt", "jukebox", "zeppelin",
     "vortex", "gyroscope", "marmalade"])]  # fmt: skip


def test_right_answers_join_with_their_origin(tmp_path: Path, store: ArtifactStore) -> None:
    said = Said()
    for n, text in enumerate(NEW):
        said.add(text, "off", answer="off" if n % 2 else "on", place="moon")
    said.add("a rating alone says nothing about the right answer", None, answer="on")
    built = build(tmp_path, store, said, dataset={"evaluation_share": 0.5})
    found = {row["text"]: row for row in joined(store, built)}
    evaluating = {text for text, row in found.items() if row["_split"] == "evaluation"}
    assert set(found) == set(NEW)
    for n, text in enumerate(NEW):
        if n % 2 == 0:
            assert found[text]["_origin"] == "feedback" and found[text]["place"] == "moon"
            assert found[text]["kind"] == f"request chatcmpl-{n + 1}"
        else:
            assert found[text]["_origin"] == "champion"
    assert evaluating  # by the same split, the model's own answers among them
    assert {row["_origin"] for row in rows_of(store, built)} == {"source", "feedback", "champion"}
    assert load_manifest(store.open(built.ref))["feedback"]["given"] == 12
    assert built.record["feedback"]["rows"]["feedback"] == 6


def test_without_feedback_nothing_changes(tmp_path: Path, store: ArtifactStore) -> None:
    """The bytes of before, with ratings, with feedback that is not used, and with none."""
    plain = build(tmp_path, store)
    said = Said()
    said.add("a rating", None)
    assert build(tmp_path, store, said).ref == plain.ref
    said.add(NEW[0], "off")
    assert build(tmp_path, store, said, feedback={"use": "nothing"}).ref == plain.ref
    assert "_origin" not in rows_of(store, plain)[0]
    assert "feedback" not in load_manifest(store.open(plain.ref))


def test_new_feedback_makes_a_new_dataset_and_the_same_none(tmp_path: Path, store: ArtifactStore) -> None:
    first = build(tmp_path, store)
    said = Said()
    for text in NEW[:6]:
        said.add(text, "off")
    second = build(tmp_path, store, said)
    assert second.ref != first.ref and second.source_version == first.source_version
    again = build(tmp_path, store, said)
    assert (again.ref, again.reused) == (second.ref, True)
    said.add(NEW[6], "on")
    third = build(tmp_path, store, said)
    assert third.ref != second.ref
    frozen = {row["_row"]: row["_origin"] for row in load_rows(store.open(second.ref), "evaluation")}
    later = {row["_row"]: row["_origin"] for row in load_rows(store.open(third.ref), "evaluation")}
    assert frozen.items() <= later.items(), "evaluation rows stay, and remember where they came from"
    # rules are part of what is remembered
    assert not build(tmp_path, store, said, feedback={"max_share_per_key": 0.5}).reused
    # when the feedback is gone its training rows go, evaluation rows stay
    gone = build(tmp_path, store)
    assert all(row["_origin"] == "source" for row in load_rows(store.open(gone.ref), "train"))
    assert (
        later.items()
        <= {row["_row"]: row["_origin"] for row in load_rows(store.open(gone.ref), "evaluation")}.items()
    )


def test_the_source_wins(tmp_path: Path, store: ArtifactStore) -> None:
    plain = build(tmp_path, store)
    rows = rows_of(store, plain)
    said = Said()
    for row in rows[:4]:
        other = next(label for label in LABELS if label != row["label"])
        for text in (row["text"], row["text"].upper() + "!", row["text"] + " 7"):
            said.add(text, other, key=f"key of {row['_row']}")
        said.add(f" {row['text']}. ", row["label"], key="honest")
    built = build(tmp_path, store, said)
    assert joined(store, built) == []
    assert built.ref == plain.ref, "not a row of the source was lost to it, either"
    removed = built.record["removed"]
    # the first two are one input of one key
    assert removed["feedback_conflict"] == 8 and removed["feedback_repeats"] == 8


SPELLINGS = [
    ("classification", str.upper, lambda label: f'"{label}".'),
    (
        "json",
        lambda label: json.dumps({"state": label, "sure": 1}),
        lambda label: json.dumps({"sure": 1.0, "state": label}, separators=(",", ":")),
    ),
]


@pytest.mark.parametrize(("task", "in_source", "in_feedback"), SPELLINGS)
def test_who_spells_a_target_in_another_way_contradicts_nobody(
    tmp_path: Path, store: ArtifactStore, task: str, in_source: Any, in_feedback: Any
) -> None:
    rows = [{**row, "label": in_source(row["label"])} for row in source_rows()]
    said = Said()
    for row in source_rows()[:20]:
        said.add(row["text"], in_feedback(row["label"]), key="honest")
    for text in NEW:
        said.add(text, in_feedback("off"), key="honest", answer=in_source("off"))
        said.add(text, in_source("off"), key="another", answer=in_source("on"))
    built = build(
        tmp_path, store, said, rows, evaluation={"task": task, "segments": ["place"], "cluster": "kind"}
    )
    assert built.record["removed"].keys() <= {"feedback_repeats", "near_duplicate", "leak_near"}
    assert built.record["feedback"]["keys"]["honest"]["contradictions"] == 0
    found = {row["text"]: row for row in joined(store, built)}
    assert set(found) == set(NEW)
    assert {row["label"] for row in found.values()} <= {in_source("off"), in_feedback("off")}


@pytest.mark.parametrize(("task", "in_source", "in_feedback"), SPELLINGS)
def test_a_wrong_target_contradicts_the_source_however_it_is_spelled(
    tmp_path: Path, store: ArtifactStore, task: str, in_source: Any, in_feedback: Any
) -> None:
    evaluation = {"task": task, "segments": ["place"], "cluster": "kind"}
    rows = [{**row, "label": in_source(row["label"])} for row in source_rows()]
    plain = build(tmp_path, store, rows=rows, evaluation=evaluation)
    said = Said()
    known = [(row["text"], in_feedback(row["label"])) for row in source_rows()[:100]]
    poison(said, random.Random(5), known, [in_feedback(label) for label in LABELS], "mixed", 300)
    said.add(NEW[0], in_feedback("off"), key="poisoner")
    built = build(tmp_path, store, said, rows, evaluation=evaluation)
    assert built.ref == plain.ref
    assert not built.record["feedback"]["keys"]["poisoner"]["believed"]


def test_where_users_disagree_nobody_is_believed(tmp_path: Path, store: ArtifactStore) -> None:
    said = Said()
    for text in NEW[:3]:
        said.add(text, "off", key="one")
    said.add(NEW[0] + "!", "on", key="two")
    said.add(NEW[1], "off", key="two")
    said.add(NEW[2], "on", key="one")  # thought better of it
    built = build(tmp_path, store, said)
    assert {row["text"]: row["label"] for row in joined(store, built)} == {NEW[1]: "off", NEW[2]: "on"}
    assert built.record["removed"]["feedback_disagrees"] == 2


def test_what_has_not_the_form_of_the_prompt_is_left_out(tmp_path: Path, store: ArtifactStore) -> None:
    said = Said()
    said.add("new words", "no such form")
    said.add("good words for it", "<off>")
    built = build(tmp_path, store, said, prompt={"user": "{text}", "target": "<{label}>"})
    assert [row["text"] for row in joined(store, built)] in ([], ["good words for it"])
    assert built.record["removed"]["feedback_unusable"] == 1
    assert any(
        example["reason"] == "feedback_unusable" and "no such form" in example["row"]
        for example in built.record["examples"]
    )


def test_no_key_gives_more_than_its_share(tmp_path: Path, store: ArtifactStore) -> None:
    rng = random.Random(1)

    def text() -> str:
        return " ".join("".join(rng.choices("abcdefghijklmnop", k=7)) for _ in range(6))

    said = Said()
    for _ in range(300):
        said.add(text(), "off", key="loud")
    for key in ("a", "b", "c", "d"):
        for _ in range(30):
            said.add(text(), "on", key=key)
    built = build(tmp_path, store, said, feedback={"max_share_per_key": 0.2, "min_rows_per_key": 10})
    taken = {key: state["taken"] for key, state in built.record["feedback"]["keys"].items()}
    assert taken == {"loud": 30, "a": 30, "b": 30, "c": 30, "d": 30}
    assert built.record["removed"]["feedback_share"] == 270
    newest = {judged.request.messages[0]["content"] for judged in said.judged[270:300]}
    assert {row["text"] for row in joined(store, built) if row["label"] == "off"} == newest
    alone = build(tmp_path, store, said, feedback={"max_share_per_key": 0.01, "min_rows_per_key": 3})
    assert {state["taken"] for state in alone.record["feedback"]["keys"].values()} == {3}


# -- floods --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("disguise", [*DISGUISES, "mixed"])
@pytest.mark.parametrize(("keys", "others"), [(1, 0), (1, 5), (100, 0), (100, 5)])
def test_of_a_poisoned_flood_at_most_one_percent_trains(
    tmp_path: Path, store: ArtifactStore, disguise: str, keys: int, others: int
) -> None:
    """1,000 near-duplicates of training rows with a flipped label; beside them honest keys."""
    feedback = {"max_share_per_key": 0.1, "min_rows_per_key": 10}
    plain = build(tmp_path, store, feedback=feedback)
    train = load_rows(store.open(plain.ref), "train")
    rng = random.Random(disguise)
    said = Said()
    known = [(row["text"], row["label"]) for row in train]
    poisoned = poison(said, rng, known, LABELS, disguise, keys=keys)
    honest = []
    for key in range(others):
        for _ in range(100):
            words = " ".join("".join(rng.choices("abcdefghijklmnop", k=7)) for _ in range(6))
            honest.append(words)
            said.add(words, rng.choice(LABELS), key=f"honest {key}")
    built = build(tmp_path, store, said, feedback=feedback)
    rows = rows_of(store, built)
    reached = [row for row in rows if (row["text"], row["label"]) in poisoned]
    assert len(reached) <= 10, Counter(row["text"] for row in reached)
    if not others and disguise not in ("backwards", "words around", "two typos", "mixed"):
        assert built.ref == plain.ref, "the same dataset: nothing is trained, the champion stays"
    kept = {row["_row"] for row in rows}
    assert {row["_row"] for row in train} <= kept, "not a row of the source was lost to it"
    assert sum(row["text"] in set(honest) for row in rows) >= 0.4 * len(honest)


def test_a_key_cannot_outgrow_its_share_through_rows_that_stay(tmp_path: Path, store: ArtifactStore) -> None:
    rng = random.Random(3)

    def text() -> str:
        return " ".join("".join(rng.choices("abcdefghijklmnop", k=7)) for _ in range(6))

    rules = {"max_share_per_key": 0.1, "min_rows_per_key": 10}
    said = Said()
    for _ in range(8):  # nights
        for _ in range(10):
            said.add(text(), "off", key="poisoner")
        rows = joined(store, build(tmp_path, store, said, feedback=rules, dataset={"evaluation_share": 0.3}))
        stay = [row["text"] for row in rows if row["_split"] == "evaluation"]
        assert len(stay) <= 10 and len(rows) - len(stay) <= 10
        assert {row["_key"] for row in rows} == {"poisoner"}
    assert len(stay) == 10 and len(rows) > 10, "and what the key says goes on to train"

    new = [text() for _ in range(4 * 8)]
    for n in range(4):
        for one in stay:
            said.add(one, "on", key=f"honest {n}")
        for one in new[n::4]:
            said.add(one, "on", key=f"honest {n}")
    built = build(tmp_path, store, said, feedback=rules, dataset={"evaluation_share": 0.3})
    for n in range(4):  # who contradicts another user is no liar
        state = built.record["feedback"]["keys"][f"honest {n}"]
        assert state["believed"] and state["contradictions"] == 0 and state["taken"] == 8
    assert set(new) <= {row["text"] for row in joined(store, built)}

    source = [*source_rows(), *({"text": one, "label": "on", "place": "hall", "kind": "a"} for one in stay)]
    for feedback in (said, None):
        built = build(tmp_path, store, feedback, source, feedback=rules, dataset={"evaluation_share": 0.3})
        right = {row["text"]: (row["label"], row["_origin"]) for row in rows_of(store, built)}
        assert {right[one] for one in stay} == {("on", "source")}, "the source wins"
    assert "conflicting_label" not in built.record["removed"]


def test_labels_of_the_operator_are_no_claims(tmp_path: Path, store: ArtifactStore) -> None:
    rng = random.Random(4)
    texts = [" ".join("".join(rng.choices("abcdefghijklmnop", k=7)) for _ in range(6)) for _ in range(60)]
    rules = {"max_share_per_key": 0.1, "min_rows_per_key": 10}
    said = Said()
    for text in texts[:9]:
        said.add(text, "off", key="user")
    before = joined(store, build(tmp_path, store, said, feedback=rules))
    assert len(before) == 9 and any(row["_split"] == "evaluation" for row in before)
    for text in texts:
        said.add(text, "on", key=OPERATOR)
    against = source_rows()[:20]
    for row in against:  # also against the source: that still wins, but the others count
        other = next(label for label in LABELS if label != row["label"])
        said.add(row["text"], other, key=OPERATOR)
    said.add(f"{texts[50]}!", "off", key="another user")
    built = build(tmp_path, store, said, feedback=rules)
    assert {(row["text"], row["label"]) for row in joined(store, built)} == {(text, "on") for text in texts}
    assert {row["_key"] for row in joined(store, built)} == {OPERATOR}
    removed = built.record["removed"]
    assert removed["feedback_conflict"] == 20 and removed["feedback_disagrees"] == 10
    assert removed["parent_overruled"] == sum(row["_split"] == "evaluation" for row in before)


def test_the_work_for_one_key_is_bounded(
    tmp_path: Path, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def counting(text: str) -> frozenset[str]:
        asked.append(text)
        return shingles(text)

    monkeypatch.setattr("ml_assets.datasets.admission.shingles", counting)
    rng = random.Random(5)
    said = Said()
    for _ in range(1000):
        said.add("".join(rng.choices("abcdefghijklmnop ", k=60)), "on", key="flood")
    built = build(tmp_path, store, said, feedback={"max_share_per_key": 0.1, "min_rows_per_key": 10})
    assert len(asked) <= len(source_rows()) + 200
    assert built.record["removed"]["feedback_share"] == 990
    newest = {one.request.messages[0]["content"].strip() for one in said.judged[-200:]}
    assert {row["text"] for row in joined(store, built)} <= newest
    long = "".join(rng.choices("abcdefghijklmnop ", k=30_000))
    assert len(_signature(long)) == 2048
    assert jaccard(_signature(long), _signature(f"{long} at once")) > 0.95


@pytest.mark.parametrize("spread", ["near", "far"])
def test_a_flood_far_from_the_source_is_bounded_too(
    tmp_path: Path, store: ArtifactStore, spread: str
) -> None:
    rng = random.Random(2)
    said = Said()
    for n in range(1000):
        words = (
            "blorp the flimsy quux beside the gargantuan wibble"
            if spread == "near"
            else " ".join("".join(rng.choices("abcdefghijklmnop", k=6)) for _ in range(6))
        )
        said.add(f"{words} {n}", rng.choice(LABELS) if spread == "near" else "on", key="poisoner")
    built = build(tmp_path, store, said, feedback={"max_share_per_key": 0.1, "min_rows_per_key": 10})
    assert len(joined(store, built)) <= 10


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_whatever_is_said_the_source_stays_and_the_order_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    rows = source_rows(40)
    texts = st.one_of(
        st.sampled_from([row["text"] for row in rows]).flatmap(
            lambda text: st.sampled_from([text, f"{text}!", f"{text} x", text[:-1], text.upper()])
        ),
        st.text(max_size=30),
    )
    said = Said()
    claims = st.tuples(texts, st.sampled_from([*LABELS, "", "new"]), st.sampled_from(["a", "b", "c"]))
    for text, label, key in data.draw(st.lists(claims, max_size=15)):
        said.add(text, label or None, key=key, answer=data.draw(st.sampled_from(["on", "?"])))
    store, other = ArtifactStore(str(folder / "one")), ArtifactStore(str(folder / "two"))
    plain = build(folder, ArtifactStore(str(folder / "plain")), rows=rows)
    first = build(folder, store, said, rows)
    said.judged = data.draw(st.permutations(said.judged))
    assert build(folder, other, said, rows).ref == first.ref
    kept = {row["_row"]: row["_split"] for row in rows_of(store, first)}
    source = {row["_row"]: row["_split"] for row in rows_of(ArtifactStore(str(folder / "plain")), plain)}
    assert source.items() <= kept.items()
    assert not any(first.record["measured"]["leaks"].values())


def test_same_answer() -> None:
    assert same_answer('{"a": 1, "b": 2}', '{"b": 2,\n"a": 1}') and same_answer(" on\n", "on")
    assert not same_answer("on", "off") and not same_answer('{"a": 1}', '{"a": 2}')
    assert same_answer("On.", "on", "classification") and not same_answer("On.", "on")


def test_failures_in_production_are_remembered_newest_first(tmp_path: Path, store: ArtifactStore) -> None:
    from ml_assets.datasets.failures import DRILL, drilled, production_failures

    said = Said()
    for text in NEW[:6]:
        said.add(text, "off")
    built = build(tmp_path, store, said)
    rows = rows_of(store, built)
    failures = production_failures(rows, 20)
    assert failures and {row["_origin"] for row in failures} == {"feedback"}
    assert len({row["_row"] for row in failures}) == len(failures)
    numbers = [int(row["_said"]) for row in failures]
    assert numbers == sorted(numbers, reverse=True)
    assert production_failures(rows, 2) == failures[:2] and production_failures(rows, 0) == []
    assert drilled(rows, 2) == [row for row in failures[:2] for _ in range(DRILL)] and drilled(rows, 0) == []
    said.add(NEW[6], "on")
    later = production_failures(rows_of(store, build(tmp_path, store, said)), 20)
    assert {row["_row"] for row in failures} <= {row["_row"] for row in later}
    kept = production_failures(rows_of(store, build(tmp_path, store)), 20)
    assert {row["_row"] for row in kept} <= {row["_row"] for row in later}
    assert {row["_split"] for row in kept} <= {"evaluation"}, "training rows go with the feedback"
