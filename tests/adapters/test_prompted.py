"""Adapters without weights: made once, attached, evaluated as the base arm that they are."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_training import small_base, small_dataset, small_inputs, small_spec

from ml_assets.adapters.fingerprint import matches, measure
from ml_assets.adapters.incremental import NoUpdate, plan_update
from ml_assets.adapters.prompted import publish_prompted
from ml_assets.adapters.train import open_inputs
from ml_assets.artifacts import ArtifactStore, read_json
from ml_assets.engine.examples import Examples, put_before, read_examples
from ml_assets.engine.generation import generate
from ml_assets.engine.loading import load_base
from ml_assets.eval_reports.build import build_report


@pytest.fixture
def store(evergreen_home: Path) -> ArtifactStore:
    return ArtifactStore(str(evergreen_home / "artifacts"))


def test_made_once_and_told_apart(evergreen_home: Path, store: ArtifactStore) -> None:
    inputs = small_inputs(store)
    bare = publish_prompted(inputs, store, evergreen_home, "zero_shot")
    shown = publish_prompted(inputs, store, evergreen_home, "few_shot")
    assert not shown.reused and bare.ref != shown.ref
    assert publish_prompted(inputs, store, evergreen_home, "few_shot").ref == shown.ref
    assert publish_prompted(inputs, store, evergreen_home, "few_shot").reused

    none, some = (read_json(store.open(made.ref) / "manifest.json") for made in (bare, shown))
    assert (none["kind"], none["rung"], none["examples"]) == ("prompt", "bare", [])
    assert 1 <= len(some["examples"]) <= inputs.spec.evaluation.few_shot
    assert all(said.startswith("turn o") and meant.startswith("{") for said, meant in some["examples"])
    assert all(probe["with"] == probe["without"] for probe in none["fingerprint"]["probes"])
    assert any(abs(p["with"] - p["without"]) > 0.001 for p in some["fingerprint"]["probes"])
    assert not list(store.open(shown.ref).glob("*.safetensors"))

    with pytest.raises(NoUpdate, match="prompt without weights"):
        plan_update(inputs, store, shown.ref, 0.1, 0.5)


def test_a_damaged_one_is_made_again(evergreen_home: Path, store: ArtifactStore) -> None:
    inputs = small_inputs(store)
    first = publish_prompted(inputs, store, evergreen_home, "zero_shot")
    (store.open(first.ref) / "manifest.json").write_text("{}")
    again = publish_prompted(inputs, store, evergreen_home, "zero_shot")
    assert not again.reused and again.ref == first.ref
    store.open(again.ref)


def test_attached_it_changes_nothing_but_the_prompt(evergreen_home: Path, store: ArtifactStore) -> None:
    inputs = small_inputs(store)
    ref = publish_prompted(inputs, store, evergreen_home, "few_shot").ref
    base = load_base(inputs.base_directory)
    base.attach("prompted", store.open(ref))
    prompt = base.chat.prompt_ids([{"role": "user", "content": "turn on light 3"}])
    plain = generate(base, [prompt], 8)[0].text
    with base.active("prompted"):
        assert generate(base, [prompt], 8)[0].text == plain
    fingerprint = base.adapters["prompted"]["fingerprint"]
    assert matches(fingerprint, measure(base, fingerprint["probes"]), "without")

    other = open_inputs(small_spec(), store, small_base(store, seed=1), small_dataset(store))
    with pytest.raises(Exception, match="made for base_identity"):
        load_base(other.base_directory).attach("prompted", store.open(ref))


@pytest.mark.parametrize("shots", ["zero_shot", "few_shot"])
def test_evaluated_as_the_bare_base_is(evergreen_home: Path, store: ArtifactStore, shots: str) -> None:
    base, dataset = small_base(store), small_dataset(store)
    spec = small_spec()
    adapter = publish_prompted(open_inputs(spec, store, base, dataset), store, evergreen_home, shots).ref  # type: ignore[arg-type]
    built = build_report(
        spec,
        Path("."),
        store,
        evergreen_home,
        adapter=adapter,
        dataset=dataset,
        base_model=base,
        champion=None,
    )
    lines = [
        (line["row"], line["arm"], line["answer"], line["prompt_tokens"])
        for line in map(json.loads, (built.directory / "rows.jsonl").read_text().splitlines())
    ]
    asked = {(row, answer, tokens) for row, arm, answer, tokens in lines if arm == "adapter"}
    assert asked == {(row, answer, tokens) for row, arm, answer, tokens in lines if arm == shots}
    assert built.record["seconds"]["adapter"] is None, "the base arm's answers were not computed again"
    assert built.decision["forgetting"] == 0.0


ROLES = st.sampled_from(["system", "user", "assistant"])


@given(
    st.lists(st.builds(lambda r, t: {"role": r, "content": t}, ROLES, st.text(max_size=5))),
    st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5)), max_size=4),
    st.integers(0, 60),
)
def test_examples_stand_between_system_and_question(messages, pairs, context) -> None:
    def tokens(conversation) -> int:
        return sum(1 + len(message["content"]) for message in conversation)

    found = Examples(tuple(pairs), 2).before(messages, tokens, context)
    shown = (len(found) - len(messages)) // 2
    assert found == put_before(messages, pairs[:shown])
    assert shown == 0 or tokens(found) + 2 <= context
    more = put_before(messages, pairs[: shown + 1])
    assert shown == len(pairs) or tokens(more) + 2 > context or shown > 0
    assert [m for m in found if m["role"] == "system"] == [m for m in messages if m["role"] == "system"]


def test_wrong_examples_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"manifest.json: examples: expected pairs"):
        read_examples(tmp_path, {"kind": "prompt", "examples": [["alone"]], "answer_tokens": 3})
