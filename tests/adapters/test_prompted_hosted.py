"""A customization on a hosted base: examples chosen by what they bring, paid for once, judged at their
price."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hosted_rows import THINGS, dataset_of, specification
from hosted_servers import KEY, KEY_NAME, Copycat, copycat, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st

from ml_assets.adapters.prompted import publish_hosted
from ml_assets.adapters.search import choose_way, requests_of, split_rows, ways_of
from ml_assets.adapters.train import AdapterInputs, open_inputs
from ml_assets.artifacts import ArtifactRef, ArtifactStore, read_json, sha256_bytes
from ml_assets.base_models.build import build_base
from ml_assets.base_models.register import current_revision
from ml_assets.engine.examples import Examples, Nearest, read_examples
from ml_assets.engine.hosted import (
    BudgetExceeded,
    HostedError,
    HostedModel,
    asked_for_labels,
    exact_label,
    open_base,
    wait_seconds,
)
from ml_assets.engine.lora import IncompatibleAdapter
from ml_assets.eval_reports.build import build_report
from ml_assets.settings import Settings
from ml_assets.spec import CustomizationSpec


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[Copycat]:
    monkeypatch.setenv(KEY_NAME, KEY)
    monkeypatch.setattr("ml_assets.engine.hosted.FIRST_WAIT", 0.01)
    with copycat() as found:
        yield found


@pytest.fixture
def store(evergreen_home: Path) -> ArtifactStore:
    return ArtifactStore(str(evergreen_home / "artifacts"))


def base_of(provider: Copycat, store: ArtifactStore, **source: Any) -> ArtifactRef:
    family = provider.family(**source)
    revision = current_revision(family, Path("."), Settings.from_env())
    return build_base(revision, [family], Path("."), Settings.from_env(), store).ref


def inputs_of(
    provider: Copycat, store: ArtifactStore, spec: CustomizationSpec, **source: Any
) -> AdapterInputs:
    return open_inputs(spec, store, base_of(provider, store, **source), dataset_of(store))


# -- choosing examples ---------------------------------------------------------------------------------


def test_what_measures_best_is_chosen_and_paid_for_once(
    provider: Copycat, store: ArtifactStore, evergreen_home: Path
) -> None:
    inputs = inputs_of(provider, store, specification())
    before = provider.chats
    made = publish_hosted(inputs, store, evergreen_home)
    sent = provider.chats - before
    assert 0 < sent <= inputs.spec.examples.max_requests + 4 and made.record["requests"] == sent
    assert made.record["money"] > 0
    assert publish_hosted(inputs, store, evergreen_home).reused and provider.chats - before == sent

    manifest = read_json(store.open(made.ref) / "manifest.json")
    assert manifest["kind"] == "prompt" and manifest["search"]["chosen"] == "nearest 3"
    measured = {one["name"]: one for one in manifest["search"]["measured"]}
    assert measured["nearest 3"]["score"] == 1.0 > max(measured[f"set {i}"]["score"] for i in range(1, 9))
    assert measured["none"]["score"] == 0.0
    assert sum(one["rows"] == 8 for one in measured.values()) == 5, "the worse half is left early"
    bodies = provider.asked[before:]
    assert all(body["temperature"] == 0 and body["seed"] == 0 for body in bodies)
    assert len({json.dumps(body["messages"]) + str(body["max_tokens"]) for body in bodies}) == sent

    shown = read_examples(store.open(made.ref), manifest)
    question = [{"role": "user", "content": "the pump, please"}]
    conversation = shown.before(question, tokens_of, 2000)
    answers = [message["content"] for message in conversation if message["role"] == "assistant"]
    assert len(answers) == 3 and answers[-1] == "pump", "the most like it last"
    probe = manifest["fingerprint"]["probes"][0]
    assert probe["without"] == tokens_of(probe["messages"]) < probe["with"]


@pytest.mark.parametrize(
    ("choose", "requests", "chosen", "sent"),
    [("nearest", 240, "nearest 3", 4), ("searched", 240, "set", 100), ("best", 0, "nearest 3", 4)],
)
def test_the_yaml_says_what_may_be_chosen(
    provider: Copycat,
    store: ArtifactStore,
    evergreen_home: Path,
    choose: str,
    requests: int,
    chosen: str,
    sent: int,
) -> None:
    inputs = inputs_of(provider, store, specification({"choose": choose, "max_requests": requests}))
    before = provider.chats
    made = publish_hosted(inputs, store, evergreen_home)
    manifest = read_json(store.open(made.ref) / "manifest.json")
    assert manifest["search"]["chosen"].startswith(chosen)
    assert provider.chats - before <= sent
    assert bool(manifest["examples"]) == (choose == "searched")


def test_a_killed_choice_goes_on_where_it_was(
    provider: Copycat, store: ArtifactStore, evergreen_home: Path
) -> None:
    inputs = inputs_of(provider, store, specification(), at_once=1, attempts=1)
    before = provider.chats
    provider.failures = [None] * 20 + [500]
    paid: list[float] = []
    with pytest.raises(HostedError, match="status 500"):
        publish_hosted(inputs, store, evergreen_home, pay=paid.append)
    broken = provider.chats - before
    assert paid and paid[0] > 0, "what was sent before it failed"
    made = publish_hosted(inputs, store, evergreen_home)
    other = ArtifactStore(str(evergreen_home / "other"))
    assert made.record["requests"] == provider.chats - before - broken
    again = publish_hosted(inputs, other, evergreen_home)
    assert again.record["requests"] == 4, "the fingerprint alone is asked again"
    assert again.ref == made.ref
    whole = made.record["requests"] + broken - 1  # the one that failed
    assert whole == requests_of(10, 16) + 4


@given(st.integers(1, 12), st.integers(0, 200))
def test_a_race_costs_what_is_predicted(ways: int, rows: int) -> None:
    assert requests_of(ways, rows) <= ways * rows
    assert requests_of(ways, rows) >= (min(rows, 8) * ways if ways > 1 else 0)


@given(st.integers(0, 60), st.integers(4, 50))
def test_rows_are_shown_or_measured_on(n: int, wanted: int) -> None:
    rows = [{"_row": sha256_bytes(str(i).encode())} for i in range(n)]
    shown, measured = split_rows(rows, wanted)
    assert len(measured) == min(wanted, n // 3)
    assert sorted([*shown, *measured], key=lambda row: row["_row"]) == sorted(rows, key=lambda r: r["_row"])


def test_no_more_ways_than_the_budget_allows(provider: Copycat, store: ArtifactStore, tmp_path: Path) -> None:
    spec = specification({"max_requests": 40})
    assert requests_of(len(ways_of(spec, [], 1)), 16) <= 40 < requests_of(len(ways_of(spec, [], 8)), 16)
    inputs = inputs_of(provider, store, spec)
    base = open_base(inputs.base_directory, tmp_path)
    assert isinstance(base, HostedModel)
    from ml_assets.datasets.snapshot import load_rows

    choose_way(base, spec, load_rows(inputs.dataset_directory, "train"))
    assert base.sent <= 40


TEXTS = st.lists(st.text(max_size=30), min_size=1, max_size=12)


@settings(deadline=None, max_examples=30)
@given(TEXTS, st.integers(0, 11))
def test_a_text_is_nearest_to_itself(texts: list[str], number: int) -> None:
    text = texts[number % len(texts)]
    nearest = Nearest.fit(texts)
    found = nearest.find(text, 3)
    assert len(found) == min(3, len(texts)) and len(set(found)) == len(found)
    if any(character.isalnum() for character in text):
        assert texts[found[0]].casefold().split() == text.casefold().split() or texts[found[0]] == text
    assert Nearest.of(nearest.tensors()).find(text, 3) == found


# -- evaluation ----------------------------------------------------------------------------------------


def report(
    store: ArtifactStore,
    home: Path,
    spec: CustomizationSpec,
    adapter: ArtifactRef,
    base: ArtifactRef,
    paid: dict[str, dict[str, float]] | None = None,
):
    return build_report(
        spec,
        Path("."),
        store,
        home,
        adapter=adapter,
        dataset=dataset_of(store),
        base_model=base,
        champion=None,
        paid=paid,
    )


def test_evaluated_like_any_other_at_its_own_price(
    provider: Copycat, store: ArtifactStore, evergreen_home: Path
) -> None:
    spec = specification()
    base = base_of(provider, store)
    adapter = publish_hosted(open_inputs(spec, store, base, dataset_of(store)), store, evergreen_home).ref
    before = provider.chats
    built = report(store, evergreen_home, spec, adapter, base)
    assert sorted(built.summary["arms"], reverse=True) == ["zero_shot", "few_shot", "adapter"]
    accuracy = {name: arm["metrics"]["accuracy"]["mean"] for name, arm in built.summary["arms"].items()}
    assert accuracy["adapter"] == 1.0 > accuracy["few_shot"] > accuracy["zero_shot"] == 0.0
    lines = [json.loads(line) for line in (built.directory / "rows.jsonl").read_text().splitlines()]
    for line in lines:
        price = (0.5 * line["prompt_tokens"] + 2.0 * line["answer_tokens"]) / 1000
        assert line["token_cost"] == pytest.approx(price), "not value.per_1000_tokens"
    own = [line["token_cost"] for line in lines if line["arm"] == "adapter"]
    value = built.summary["arms"]["adapter"]["value"]["mean"]
    assert value == pytest.approx(1000 * (1 - sum(own) / len(own)))
    paid = built.record["hosted"][read_json(store.open(base) / "manifest.json")["revision"]]
    assert paid["requests"] == provider.chats - before == 30
    assert paid["money"] == pytest.approx(sum(line["token_cost"] for line in lines), rel=1e-3)
    assert report(store, evergreen_home, spec, adapter, base).reused


def test_labels_are_named_and_recognized(
    provider: Copycat, store: ArtifactStore, evergreen_home: Path
) -> None:
    spec = specification({"choose": "nearest"}, answer_by="label_scores")
    base = base_of(provider, store)
    adapter = publish_hosted(open_inputs(spec, store, base, dataset_of(store)), store, evergreen_home).ref
    before = provider.chats
    built = report(store, evergreen_home, spec, adapter, base)
    assert built.summary["arms"]["adapter"]["metrics"]["accuracy"]["mean"] == 1.0
    told = provider.asked[before]["messages"][0]
    assert told["role"] == "system" and told["content"].startswith("Name the device.\n\nAnswer with exactly")
    assert all(f"- {thing}" in told["content"] for thing in THINGS)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("lamp", "lamp"),
        (" **Lamp.** ", "lamp"),
        ("It is the lamp!", "lamp"),
        ("floor lamp", "floor lamp"),
        ("the floor lamp, I think", "floor lamp"),
        ("lamp or door", "lamp or door"),
        ("lamps", "lamps"),
        ("", ""),
    ],
)
def test_which_label_is_meant(said: str, meant: str) -> None:
    assert exact_label(said, ["door", "floor lamp", "lamp"]) == meant


def test_labels_without_a_system_message() -> None:
    asked = asked_for_labels([{"role": "user", "content": "what?"}], ["a", "b "])
    assert [message["role"] for message in asked] == ["system", "user"]
    assert asked[0]["content"].endswith("- a\n- b")


# -- guards --------------------------------------------------------------------------------------------


def test_a_budget_is_looked_at_before_the_first_request(
    provider: Copycat, store: ArtifactStore, evergreen_home: Path
) -> None:
    spec = specification({"choose": "nearest"})
    base = base_of(provider, store, max_requests=20)
    adapter = publish_hosted(open_inputs(spec, store, base, dataset_of(store)), store, evergreen_home).ref
    before = provider.chats
    paid: dict[str, dict[str, float]] = {}
    with pytest.raises(BudgetExceeded, match="10 requests are needed, of max_requests 20 are 0 left"):
        report(store, evergreen_home, spec, adapter, base, paid)
    assert provider.chats - before == 20
    [spent] = paid.values()
    assert spent["requests"] == 20 and spent["money"] > 0, "it counts although the report failed"
    before = provider.chats
    assert report(store, evergreen_home, spec, adapter, base).record["hosted"], "what was paid for is kept"
    assert provider.chats - before == 10


def test_failures_in_the_middle(
    provider: Copycat, store: ArtifactStore, evergreen_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = open_base(store.open(base_of(provider, store)), evergreen_home)
    assert isinstance(base, HostedModel)
    asked = [[{"role": "user", "content": f"question {i}"}] for i in range(12)]
    provider.failures = [429, None, "garbage", 500, None, 503]
    replies, new = base.answers(asked, 8)
    assert new and [reply.text for reply in replies] == ["unsure"] * 12
    assert base.sent == 16, "each failure once more"
    provider.failures = [None, 401]
    before = provider.chats
    with pytest.raises(HostedError, match=r"status 401 \(the key in environment variable") as error:
        base.answers([[{"role": "user", "content": f"other {i}"}] for i in range(100)], 8)
    assert provider.chats - before < 20, "what has not begun is not paid for"
    assert KEY not in str(error.value) and KEY not in caplog.text and KEY not in repr(base.provider)


@given(st.integers(1, 20), st.one_of(st.none(), st.floats(0, 1000)))
def test_waiting(attempt: int, said: float | None) -> None:
    pause = wait_seconds(HostedError("busy", status=429, transient=True, retry_after=said), attempt)
    if said is not None:
        assert pause == (said if said <= 120 else None)
    else:
        assert pause is not None and 0.25 <= pause <= 30
    assert wait_seconds(HostedError("wrong", status=400), attempt) is None


def test_weights_do_not_fit(
    provider: Copycat, store: ArtifactStore, evergreen_home: Path, tmp_path: Path
) -> None:
    base = open_base(store.open(base_of(provider, store)), evergreen_home)
    manifest = {"kind": "lora", "base_identity": base.manifest["identity"], "base_revision": "x@1"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IncompatibleAdapter, match="expected a prompt for copycat@"):
        base.attach("adapter", tmp_path)


def test_examples_are_equal_by_what_they_show() -> None:
    assert Examples((("a", "b"),), 3) == Examples((("a", "b"),), 3)
