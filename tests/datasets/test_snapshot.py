import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml_assets.datasets.snapshot import (
    Snapshot,
    SnapshotError,
    build_manifest,
    build_snapshot,
    load_manifest,
    load_rows,
    normalize,
    same_target,
    write_snapshot,
)
from ml_assets.datasets.sources import BadRow, SourceRows
from ml_assets.spec import CustomizationSpec

WORDS = [
    "alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliet", "kilo",
    "lima", "mike", "november", "oscar", "papa",
]  # fmt: skip


def spec(**dataset) -> CustomizationSpec:
    evaluation = dataset.pop("evaluation", {"task": "text"})
    prompt = dataset.pop("prompt", {"user": "{q}", "target": "{a}"})
    adapter = dataset.pop("adapter", {})
    return CustomizationSpec(
        name="faq",
        source={"kind": "jsonl", "path": "faq.jsonl"},
        prompt=prompt,
        base_models=["base"],
        dataset=dataset,
        evaluation=evaluation,
        adapter=adapter,
    )


def source(rows, bad=()) -> SourceRows:
    return SourceRows("faq.jsonl", list(rows), [f"faq.jsonl:{n}" for n in range(1, len(rows) + 1)], list(bad))


def question(number: int) -> str:
    """A text of its own for each number, unlike the others."""
    words = []
    for _ in range(6):
        number, digit = divmod(number * 7919 + 13, len(WORDS))
        words.append(WORDS[digit])
    return f"{' '.join(words)} {number}"


def faq(count: int, start: int = 0) -> list[dict]:
    return [{"q": f"{n} {question(n)}", "a": f"answer {n}"} for n in range(start, start + count)]


def build(rows, parent=None, **dataset) -> Snapshot:
    return build_snapshot(spec(**dataset), source(rows), parent)


def questions(rows) -> set[str]:
    return {row["q"] for row in rows}


# -- the promise: determinism, and rows that stay on their side --------------------------------------------

ROW = st.fixed_dictionaries(
    {
        "q": st.text("abcde ", min_size=1, max_size=12).filter(str.strip),
        "a": st.sampled_from(["yes", "no"]),
        "g": st.sampled_from(["g1", "g2", "g3", "g4", ""]),
    }
)


@settings(max_examples=40, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=25), st.lists(ROW, max_size=25), st.booleans())
def test_a_row_never_changes_sides_as_the_data_grows(old, new, grouped):
    options = {"evaluation_share": 0.4, "near_duplicate": 0.7, "group_by": "g" if grouped else None}
    columns = {"evaluation": {"task": "text", "segments": ["g"]}}
    before = build(old, **options, **columns)
    for rows in ([*old, *new], new or old):
        after = build(rows, before.evaluation, **options, **columns)
        kept = {row["_row"] for row in before.evaluation}
        assert kept <= {row["_row"] for row in after.evaluation}, "evaluation rows only grow"
        assert not kept & {row["_row"] for row in after.train}
        assert not {row["_row"] for row in before.train} & {row["_row"] for row in after.evaluation}
        assert after.measured["leaks"] == {"exact": 0, "near": 0, "group": 0}
        assert len({row["_row"] for row in [*after.train, *after.evaluation]}) == len(after.train) + len(
            after.evaluation
        )


@settings(max_examples=40, deadline=None)
@given(st.lists(ROW, min_size=2, max_size=20), st.randoms())
def test_the_order_of_rows_does_not_matter(rows, random):
    one = build(rows, group_by="g")
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert build(shuffled, group_by="g") == one


def test_same_content_same_bytes(tmp_path):
    rows = faq(50)
    for name, order in (("one", rows), ("two", rows[::-1])):
        (tmp_path / name).mkdir()
        snapshot = build(order)
        manifest = build_manifest(spec(), snapshot, "v", None)
        write_snapshot(snapshot, tmp_path / name, manifest)
    for file in ("rows.parquet", "manifest.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_what_is_written_is_what_is_read(tmp_path):
    snapshot = build([*faq(40), {"q": "line\nbreak 😀 \u2028", "a": "{}"}])
    write_snapshot(snapshot, tmp_path, build_manifest(spec(), snapshot, "v1", "p" * 64))
    assert load_rows(tmp_path, "train") == snapshot.train
    assert load_rows(tmp_path, "evaluation") == snapshot.evaluation
    assert [set(row) for row in snapshot.train[:1]] == [{"q", "a", "_row", "_split"}]
    table = pyarrow.parquet.read_table(tmp_path / "rows.parquet")
    assert table.column("_row").to_pylist() == sorted(table.column("_row").to_pylist())
    manifest = load_manifest(tmp_path)
    assert manifest["rows"] == {"train": len(snapshot.train), "evaluation": len(snapshot.evaluation)}
    assert manifest["source_version"] == "v1"
    assert manifest["parent"] == "p" * 64
    with pytest.raises(ValueError, match="'test': expected 'train' or 'evaluation'"):
        load_rows(tmp_path, "test")


def test_rows_remember_how_often_the_source_has_them(tmp_path):
    rows = faq(40)
    plain = build(rows)
    assert not any("_count" in row for row in [*plain.train, *plain.evaluation])
    snapshot = build([*rows, *rows[:20], *rows[:20]])
    both = [*snapshot.train, *snapshot.evaluation]
    often = {row["q"] for row in rows[:20]}
    assert {row["q"]: row["_count"] for row in both} == {
        row["q"]: "3" if row["q"] in often else "1" for row in rows
    }
    assert {row["_row"] for row in both} == {row["_row"] for row in [*plain.train, *plain.evaluation]}
    write_snapshot(snapshot, tmp_path, build_manifest(spec(), snapshot, "v1", None))
    assert load_rows(tmp_path, "evaluation") == snapshot.evaluation
    # evaluation rows have today's count, or the last one
    later = build([*rows[10:], *rows[10:20]], snapshot.evaluation)
    counts = {row["q"]: row["_count"] for row in later.evaluation}
    kept = [row for row in snapshot.evaluation if row["q"] in often]
    assert {number for number, row in enumerate(rows[:20]) if row["q"] in counts} - set(range(10, 20))
    for row in kept:
        assert counts[row["q"]] == ("3" if row["q"] in {row["q"] for row in rows[:10]} else "2")


# -- validation --------------------------------------------------------------------------------------------


def test_values_are_normalized():
    assert normalize("  cafe\u0301\u00a0au\u200b lait\r\n\tx  \r\n") == "café au lait\n\tx"
    assert normalize("    indented\n    code") == "indented\n    code"
    assert [normalize(value) for value in (None, True, 1.5, 3, ["ä"], {"b": 1, "a": None})] == [
        "", "true", "1.5", "3", '["ä"]', '{"b": 1, "a": null}',
    ]  # fmt: skip


def test_missing_column_names_which_exist():
    with pytest.raises(SnapshotError, match=r"faq\.jsonl: no column 'q', 'a'; the columns are: x, y"):
        build([{"x": 1, "y": 2}])
    with pytest.raises(SnapshotError, match="no column 'lang'; the columns are: q, a"):
        build(faq(3), evaluation={"task": "text", "segments": ["lang"]})


def test_bad_rows_are_shown_and_stop_the_build():
    rows = [*faq(20), {"q": "x"}, {"q": " ", "a": "y"}, {"q": "z", "a": None}, *({"q": "w", "a": ""},) * 4]
    bad = [BadRow("faq.jsonl:99", "not JSON (Expecting value at column 1)", "{")]
    with pytest.raises(SnapshotError) as caught:
        build_snapshot(spec(), source(rows, bad))
    assert str(caught.value).splitlines() == [
        "faq.jsonl: 8 of 28 rows cannot be used, dataset.max_bad_share allows 0.00%:",
        "  faq.jsonl:99: not JSON (Expecting value at column 1) in '{'",
        """  faq.jsonl:21: column 'a' is missing in '{"q": "x"}'""",
        """  faq.jsonl:22: column 'q' is empty in '{"q": " ", "a": "y"}'""",
        """  faq.jsonl:23: column 'a' is empty in '{"q": "z", "a": null}'""",
        """  faq.jsonl:24: column 'a' is empty in '{"q": "w", "a": ""}'""",
        "  and 3 more",
    ]
    snapshot = build_snapshot(spec(max_bad_share=0.3), source(rows, bad))
    assert snapshot.removed == {"bad_row": 8}
    assert len(snapshot.train) + len(snapshot.evaluation) == 20
    with pytest.raises(SnapshotError, match="8 of 28 rows cannot be used"):
        build_snapshot(spec(max_bad_share=0.28), source(rows, bad))


def test_bad_rows_are_shown_without_personal_data():
    rows = [*faq(20), {"q": "write to anna@example.com", "a": ""}]
    snapshot = build(rows, max_bad_share=0.1)
    (example,) = snapshot.examples
    assert "[EMAIL]" in example["row"]
    assert "anna" not in json.dumps(snapshot.examples)


def test_target_that_cannot_fit_is_a_bad_row():
    rows = [*faq(20), {"q": "long", "a": "word " * 40}]
    reason = r"faq\.jsonl:21: the target has 40 words, which cannot fit adapter\.max_length 32 tokens"
    with pytest.raises(SnapshotError, match=reason):
        build(rows, adapter={"max_length": 32})
    assert build(rows, adapter={"max_length": 41}).removed == {}


JSON = {"evaluation": {"task": "json"}}


def orders(count: int, spelled=json.dumps) -> list[dict]:
    return [{"q": f"{n} {question(n)}", "a": spelled({"item": n % 5, "of": ["ü"]})} for n in range(count)]


def test_a_target_that_is_not_json_is_a_bad_row_where_json_is_scored():
    broken = ["{", '{"n": NaN}', "9" * 5000, "[" * 5000, "[" * 600 + "]" * 600]
    rows = [*orders(20), *({"q": f"broken {n}", "a": text} for n, text in enumerate(broken))]
    with pytest.raises(SnapshotError, match=r"faq\.jsonl:21: the target is not JSON \(Expecting property"):
        build(rows, **JSON)
    snapshot = build(rows, max_bad_share=0.5, **JSON)
    assert snapshot.removed == {"bad_row": 5}
    assert not any("broken" in row["q"] for row in [*snapshot.train, *snapshot.evaluation])
    assert build(rows, evaluation={"task": "text"}).removed == {}


def test_a_target_that_is_not_json_without_its_personal_data_is_a_bad_row():
    rows = [*orders(20), {"q": "the card of the shop", "a": '{"card": 4111111111111111}'}]
    snapshot = build(rows, **JSON)
    assert snapshot.removed == {"bad_row": 1}
    assert "4111111111111111" not in json.dumps(snapshot.examples)
    assert build([*rows[:-1], {**rows[-1], "a": '{"card": "4111111111111111"}'}], **JSON).removed == {}


def test_a_segment_may_be_empty():
    rows = [{**row, "lang": None} for row in faq(20)]
    snapshot = build(rows, evaluation={"task": "text", "segments": ["lang"]})
    assert list(snapshot.measured["segments"]["lang"]) == [""]


# -- personal data -----------------------------------------------------------------------------------------


def test_personal_data_is_replaced_in_every_column():
    rows = [
        {"q": f"I am user{n}@example.com number {n}", "a": f"call +49 30 {1234500 + n} {n}"}
        for n in range(20)
    ]
    snapshot = build(rows)
    text = json.dumps([snapshot.train, snapshot.evaluation])
    assert "@example.com" not in text
    assert "+49" not in text
    assert snapshot.redacted == {"email": 20, "phone": 20}


def test_a_group_that_is_personal_data_still_groups():
    rows = [{**row, "customer": f"user{n // 5}@example.com"} for n, row in enumerate(faq(60))]
    snapshot = build(rows, group_by="customer")
    groups = Counter(row["customer"] for row in [*snapshot.train, *snapshot.evaluation])
    assert set(groups.values()) == {5}
    assert len(groups) == 12
    assert "@" not in json.dumps([snapshot.train, snapshot.evaluation])
    assert not {row["customer"] for row in snapshot.train} & {row["customer"] for row in snapshot.evaluation}


# -- duplicates, contradictions, leakage -------------------------------------------------------------------


def test_exact_duplicates_go_whatever_their_notes():
    rows = [{**row, "lang": lang} for row in faq(30) for lang in ("en", "de")]
    snapshot = build(rows, evaluation={"task": "text", "segments": ["lang"]})
    assert snapshot.removed == {"exact_duplicate": 30}
    assert {row["lang"] for row in [*snapshot.train, *snapshot.evaluation]} == {"de"}


def test_conflicting_labels_are_reported_and_removed():
    rows = [*faq(30), {"q": "is it open", "a": "yes"}, {"q": "Is it  open", "a": "no"}]
    snapshot = build(rows)
    assert snapshot.removed == {"conflicting_label": 2}
    assert snapshot.measured["conflicting_inputs"] == 1
    assert {example["because"] for example in snapshot.examples} == {
        "the same input also has the target no",
        "the same input also has the target yes",
    }
    assert not any("open" in text.lower() for text in questions([*snapshot.train, *snapshot.evaluation]))


def test_spelling_does_not_make_another_target():
    rows = orders(60)
    again = orders(60, lambda value: json.dumps(dict(reversed(value.items())), separators=(",", ":")))
    assert not {row["a"] for row in rows} & {row["a"] for row in again}
    plain = build(rows, **JSON)
    for parent in (None, plain.evaluation):
        both = build([*again, *rows], parent, **JSON)
        assert both.removed == {"exact_duplicate": 60}
        for side in ("train", "evaluation"):
            assert questions(getattr(both, side)) == questions(getattr(plain, side)), "one row of each input"
    spellings = {row["a"] for row in [*rows, *again]}
    assert {row["a"] for row in [*both.train, *both.evaluation]} <= spellings, "as the source spells it"
    respelled = build(again, plain.evaluation, **JSON)
    assert respelled.evaluation == plain.evaluation, "frozen rows stay"
    assert respelled.measured["conflicting_inputs"] == 0
    assert build([*rows, {**rows[0], "a": '{"item": 7}'}], **JSON).removed == {"conflicting_label": 2}


def test_what_is_the_same_target_is_what_scores_the_same():
    def same(task, one, other):
        return same_target(task, one) == same_target(task, other)

    assert same("json", '{"a": 1, "b": "ü"}', '{"b":"\\u00fc","a":1.0}')
    assert same("classification", "Spam", '"spam".') and not same("classification", "spam", "ham")
    assert not same("json", '{"a": 1}', '{"a": true}') and not same("json", "[1, 2]", "[2, 1]")
    assert not same("text", "Spam", "spam") and not same("text", '{"a":1}', '{"a": 1}')
    assert not same("classification", "*", "**"), "where nothing is left of a label, its text counts"
    assert same_target("json", '"\\ud83d ü"') == '"\\ud83d ü"', "half of a character stays an escape"


LONG = "the committee met on monday to talk about the budget for the coming year and agreed on nothing at all"


def test_near_duplicates_within_training_need_the_same_target():
    near = [{"q": f"{LONG} {mark}", "a": "politics"} for mark in ("", ".", "!", "?")]
    other = [{"q": f"{LONG} !!", "a": "sports"}]
    snapshot = build([*faq(30), *near, *other], evaluation_share=1e-9)
    kept = [row for row in snapshot.train if row["q"].startswith(LONG)]
    assert Counter(row["a"] for row in kept) == {"politics": 1, "sports": 1}
    assert snapshot.removed == {"near_duplicate": 3}
    assert build([*faq(30), *near], evaluation_share=1e-9, near_duplicate=1.0).removed == {}


def test_leakage_is_removed_from_training_exact_near_and_by_group():
    evaluation = [{"q": LONG, "a": "politics", "g": "monday"}]
    parent = build(evaluation, evaluation_share=0.999999, group_by="g").evaluation
    assert len(parent) == 1
    rows = [
        {"q": LONG.upper(), "a": "politics", "g": "other"},
        {"q": f"{LONG}.", "a": "politics", "g": "another"},
        {"q": "unlike the rest", "a": "sports", "g": "monday"},
        *({**row, "g": ""} for row in faq(20)),
    ]
    snapshot = build(rows, parent, evaluation_share=1e-9, group_by="g")
    assert snapshot.removed == {"leak_exact": 1, "leak_near": 1, "leak_group": 1}
    assert len(snapshot.train) == 20
    assert snapshot.measured["leaks"] == {"exact": 0, "near": 0, "group": 0}


def test_leaks_that_are_left_are_counted():
    """The measure is not the remover: it finds what a remover that does nothing leaves."""
    from ml_assets.datasets.snapshot import _Builder

    builder = _Builder(spec(group_by="g"))
    rows = [
        {"q": LONG, "a": "x", "g": "1"},
        {"q": f"{LONG}.", "a": "x", "g": "2"},
        {"q": "far away", "a": "x", "g": "3"},
    ]
    train = [{**row, "_row": builder.row_hash(row)} for row in rows]
    evaluation = [dict(train[0]), {"q": "elsewhere", "a": "x", "g": "3", "_row": "0"}]
    snapshot = Snapshot(train, evaluation, ["q", "a"], {}, {})
    assert builder.measure(snapshot, [])["leaks"] == {"exact": 1, "near": 2, "group": 2}


# -- the parent snapshot -----------------------------------------------------------------------------------


def test_frozen_rows_stay_when_the_source_drops_them_or_corrects_their_label():
    first = build(faq(60))
    kept = first.evaluation[0]
    second = build(
        [row for row in faq(80) if row["q"] not in questions(first.evaluation)]
        + [{"q": kept["q"], "a": "new"}],
        first.evaluation,
    )
    assert questions(first.evaluation) <= questions(second.evaluation)
    assert [row["a"] for row in second.evaluation if row["q"] == kept["q"]] == [kept["a"]]
    assert second.removed == {"conflicting_label": 1}
    assert second.measured["kept_from_parent"] == len(first.evaluation)


def test_a_corrected_label_of_a_training_row_stays_in_training():
    first = build(faq(60))
    rows = [{**row, "a": f"better {row['a']}"} for row in faq(60)]
    second = build(rows, None)
    assert questions(second.train) == questions(first.train)


def test_frozen_rows_without_a_column_of_the_new_prompt_go():
    first = build(faq(60))
    rows = [{**row, "hint": "none"} for row in faq(60)]
    prompt = {"user": "{q} ({hint})", "target": "{a}"}
    second = build(rows, first.evaluation, prompt=prompt)
    assert second.removed["parent_without_column"] == len(first.evaluation)


def test_a_frozen_row_that_cannot_be_scored_goes():
    from ml_assets.datasets.asset import REASONS

    rows = orders(60)
    first = build([{**row, "a": row["a"][:-1]} if n % 2 else row for n, row in enumerate(rows)])
    broken = [row for row in first.evaluation if not row["a"].endswith("}")]
    assert broken
    second = build(rows, first.evaluation, **JSON)
    assert second.removed == {"parent_unscorable": len(broken)}
    assert set(second.removed) <= set(REASONS)
    assert questions(second.evaluation) == questions(first.evaluation), "as the source has them today"
    assert all(json.loads(row["a"]) for row in second.evaluation)
    assert build(rows, first.evaluation).measured["kept_from_parent"] == len(first.evaluation)


def test_frozen_rows_get_the_group_that_is_asked_for_later():
    rows = [{**row, "g": f"conversation {n // 5}"} for n, row in enumerate(faq(200))]
    group_of = {row["q"]: row["g"] for row in rows}
    first = build(rows)
    gone, corrected = first.evaluation[0]["q"], first.evaluation[1]["q"]
    today = [
        {**row, "a": "another answer"} if row["q"] == corrected else row for row in rows if row["q"] != gone
    ]
    second = build(today, first.evaluation, group_by="g")
    assert questions(first.evaluation) <= questions(second.evaluation)
    assert len(questions(second.evaluation)) == len(second.evaluation), "no row twice"
    assert [row["q"] for row in second.evaluation if not row["g"]] == [gone]
    assert second.measured["kept_without_group"] == 1
    evaluating = {group_of[row["q"]] for row in second.evaluation if row["q"] != gone}
    assert second.train and not evaluating & {row["g"] for row in second.train}
    third = build(today, second.evaluation, group_by="g")
    assert (third.train, third.evaluation) == (second.train, second.evaluation)
    assert "kept_without_group" not in build(rows, group_by="g").measured


def test_frozen_rows_follow_stricter_redaction():
    rows = [{"q": f"{n} mail a{n}@b.com", "a": f"answer {n}"} for n in range(60)]
    first = build(rows, redact=[])
    assert "@" in json.dumps(first.evaluation)
    second = build(rows, first.evaluation, redact=["email"])
    assert "@" not in json.dumps(second.evaluation)
    assert second.measured["conflicting_inputs"] == 0


# -- findings ----------------------------------------------------------------------------------------------


def test_class_balance_and_segments_are_counted_on_both_sides():
    rows = [{**row, "a": "spam" if n % 4 else "ham", "lang": "en"} for n, row in enumerate(faq(80))]
    snapshot = build(rows, evaluation={"task": "classification", "segments": ["lang"]})
    classes = snapshot.measured["classes"]
    assert list(classes) == ["spam", "ham"]
    assert sum(classes["spam"].values()) == 60
    assert snapshot.measured["segments"] == {
        "lang": {"en": {"train": len(snapshot.train), "evaluation": len(snapshot.evaluation)}}
    }


def test_manifest_names_the_source_without_its_password(tmp_path: Path):
    secret = CustomizationSpec(
        **spec().model_dump(exclude={"source"}),
        source={"kind": "sql", "url": "postgresql://u:secret@h/db", "query": "select 1"},
    )
    snapshot = build(faq(20))
    assert "secret" not in json.dumps(build_manifest(secret, snapshot, "v", None))
