"""The model behind a defs.yaml: defaults, the gate's arithmetic, templates, and its reference page."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from customizations import COLOURS_YAML
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import norm

from ml_assets.cli.reference import reference
from ml_assets.spec import (
    CustomizationSpec,
    EvaluationSpec,
    GateSpec,
    HostedBase,
    SqlSource,
    template_columns,
    without_password,
)


def spec(**changes: Any) -> CustomizationSpec:
    return CustomizationSpec.model_validate(yaml.safe_load(COLOURS_YAML)["attributes"] | changes)


def test_the_smallest_file_has_under_20_lines_and_sensible_defaults() -> None:
    assert len(COLOURS_YAML.splitlines()) < 20
    small = spec()
    assert small.columns() == ["text", "colour"]
    assert small.evaluation.resolved_metrics() == ["accuracy", "macro_f1"]
    assert small.adapter.rank == 16 and small.adapter.targets == "all-linear"


def test_columns_are_those_that_anything_names() -> None:
    rich = spec(
        dataset={"group_by": "conversation"},
        evaluation={"task": "json", "segments": ["place", "text"], "cluster": "template"},
    )
    assert set(rich.columns()) == {"text", "colour", "place", "conversation", "template"}
    assert len(rich.columns()) == 5


def test_a_spec_survives_json() -> None:
    rich = spec(
        source={"kind": "python", "callable": "a.b:c", "args": {"n": 3, "deep": [1, {"x": None}]}},
        evaluation={"task": "text", "metrics": ["chrf", {"callable": "a:b"}]},
        adapter={"targets": ["q_proj"], "steps": 3},
    )
    assert CustomizationSpec.model_validate_json(rich.model_dump_json()) == rich


@settings(deadline=None)
@given(st.floats(0.001, 0.5), st.floats(0.001, 0.49))
def test_the_gate_needs_as_many_rows_as_tangos_bound_without_flips(margin: float, alpha: float) -> None:
    """n pairs without a flip: the score statistic is sqrt(n * margin / (1 - margin))."""
    gate = GateSpec(margin=margin, alpha=alpha)
    rows = gate.fewest_rows()

    def significance(n: int) -> float:
        return float(norm.sf(math.sqrt(n * margin / (1 - margin))))

    assert significance(rows) <= alpha * (1 + 1e-6)
    assert rows == 0 or significance(rows - 1) > alpha * (1 - 1e-6)


@given(st.integers(1, 1000), st.sampled_from([0.005, 0.01, 0.02, 0.05, 0.1]))
def test_a_gate_is_impossible_exactly_below_that(rows: int, margin: float) -> None:
    possible = rows >= GateSpec(margin=margin).fewest_rows()
    try:
        EvaluationSpec(task="classification", max_rows=rows, gate=GateSpec(margin=margin))
    except ValidationError as error:
        assert not possible and "impossible gate" in str(error)
    else:
        assert possible
    # a bootstrap over graded scores has no such bound
    EvaluationSpec(task="text", max_rows=rows, gate=GateSpec(margin=margin))


NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(), NAMES)))
def test_template_columns_are_the_named_ones_in_order(parts: list[tuple[str, str]]) -> None:
    escaped = [(text.replace("{", "{{").replace("}", "}}"), name) for text, name in parts]
    template = "".join(f"{text}{{{name}}}" for text, name in escaped)
    assert template_columns(template) == list(dict.fromkeys(name for _, name in parts))


@pytest.mark.parametrize(
    "template", ["{", "}", "{a", "a}", "{}", "{0}", "{a.b}", "{a[0]}", "{a b}", "{a!r}", "{a:>9}", '{"a": 1}']
)
def test_what_is_no_template_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match=r"brace|column name"):
        template_columns(template)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://anna:s3cret@db:5432/shop", "postgresql://anna:***@db:5432/shop"),
        ("postgresql+psycopg://anna:a:b%40c@db/shop", "postgresql+psycopg://anna:***@db/shop"),
        ("postgresql://anna:p/w@x@db/shop", "postgresql://anna:***@db/shop"),
        ("postgresql://db/shop?user=anna&password=a%20b", "postgresql://db/shop?user=anna&password=***"),
        ("https://ghp_token@host/rows.csv", "https://***@host/rows.csv"),
        ("https://host/rows.csv?v=2&sig=ab%2F&x=1", "https://host/rows.csv?v=2&sig=***&x=1"),
        ("abfs://container@account.example.com/rows", "abfs://container@account.example.com/rows"),
        ("sqlite:////data/shop.db", "sqlite:////data/shop.db"),
        ("s3://bucket/rows/*.jsonl", "s3://bucket/rows/*.jsonl"),
        ("https://host:8080/a@b", "https://host:8080/a@b"),
        ("data/rows.jsonl", "data/rows.jsonl"),
    ],
)
def test_passwords_do_not_leave_the_spec(url: str, shown: str) -> None:
    assert without_password(url) == shown
    source = SqlSource(kind="sql", url=url, query="select 1")
    assert source.url == url and source.model_dump()["url"] == shown


def test_the_reference_page_is_up_to_date_and_complete() -> None:
    page = (Path(__file__).parent.parent / "docs" / "customization.md").read_text()
    assert page == reference(), "run: python -m ml_assets.cli.reference > docs/customization.md"
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(lines) > 60
    undocumented = [line for line in lines if line.endswith("|  |") and not line.startswith("| `kind`")]
    assert undocumented == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"url": "api.example.com"}, "expected an http or https URL"),
        ({"url": "https://me:secret@api.example.com/v1"}, "without user, password and parameters"),
        ({"url": "https://api.example.com/v1?key=secret"}, "without user, password and parameters"),
        ({"key": "sk-0123"}, "String should match pattern"),
        ({"model": ""}, "at least 1 character"),
        ({"per_1000_prompt_tokens": -1}, "greater than or equal to 0"),
    ],
)
def test_a_hosted_base_says_where_and_never_the_key(source: dict[str, Any], message: str) -> None:
    whole = {"kind": "hosted", "url": "https://api.example.com/v1/", "model": "m", "revision": "1"}
    assert HostedBase.model_validate(whole).url == "https://api.example.com/v1"
    with pytest.raises(ValidationError, match=message):
        HostedBase.model_validate(whole | source)
