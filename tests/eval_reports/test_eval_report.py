"""What a report says about old and new rows."""

from ml_assets.eval_reports.gate import decide
from ml_assets.eval_reports.report import render_html, summarize
from ml_assets.spec import EvaluationSpec


def line(row: str, arm: str, right: bool, intent: str) -> dict:
    return {
        "row": row,
        "arm": arm,
        "prompt": f"what is {row}",
        "expected": "yes",
        "answer": "yes" if right else "no",
        "scores": {"exact_match": float(right)},
        "right": right,
        "refused": False,
        "segments": {"intent": intent},
        "cluster": None,
        "must_pass": False,
        "sampled": True,
        "prompt_tokens": 5,
        "answer_tokens": 1,
        "finished": True,
    }


def test_what_changed_on_old_rows_and_on_new_ones() -> None:
    spec = EvaluationSpec.model_validate(
        {"task": "text", "metrics": ["exact_match"], "segments": ["intent"], "max_rows": 500}
    )
    # four old rows, of which the candidate loses one, and two new ones that only the candidate knows
    champion = [line(f"r{i}", "champion", i < 4, "on" if i % 2 else "off") for i in range(6)]
    adapter = [line(f"r{i}", "adapter", i != 1, "on" if i % 2 else "off") for i in range(6)]
    bare = [line(f"r{i}", "zero_shot", False, "on" if i % 2 else "off") for i in range(6)]
    decision = decide(adapter, champion, spec, against="champion")
    lines = [*bare, *adapter, *champion]
    about = {"customization": "x", "base_revision": "tiny@0"}
    summary = summarize(lines, spec, decision, about, {"r0", "r1", "r2", "r3"})
    found = {(part["rows_are"], part["segment"]): part for part in summary["transfer"]}
    assert found["old", "all"] | {"segment": ""} == {
        "rows_are": "old",
        "segment": "",
        "rows": 4,
        "before": 1.0,
        "after": 0.75,
        "change": -0.25,
    }
    assert found["old", "intent = on"]["change"] == -0.5 and found["old", "intent = off"]["change"] == 0
    assert found["new", "all"]["change"] == 1.0 and found["new", "all"]["rows"] == 2
    assert [part["rows_are"] for part in summary["transfer"]] == ["old"] * 3 + ["new"] * 3
    assert "What does it change on old rows, what on new ones?" in render_html(summary, lines)

    alone = summarize([*bare, *adapter], spec, decide(adapter, bare, spec, against="base"), {})
    assert alone["transfer"] == []
