"""Hosted base models: what a revision is, and what the probe finds, on a server that may fail."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from hosted_servers import KEY, KEY_NAME, Copycat, copycat

from ml_assets.artifacts import ArtifactStore
from ml_assets.base_models.asset import build_base_model_asset
from ml_assets.base_models.build import build_base
from ml_assets.base_models.identity import BaseModelError
from ml_assets.base_models.partitions import BASE_MODELS
from ml_assets.base_models.register import current_revision
from ml_assets.base_models.sources import HubAccess, SourceUnavailable
from ml_assets.settings import Settings
from ml_assets.spec import BaseFamily
from resources.artifact_store import ArtifactRefIOManager, ArtifactStoreResource
from resources.base_model_hub import BaseModelHub


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[Copycat]:
    monkeypatch.setenv(KEY_NAME, KEY)
    with copycat() as found:
        yield found


@pytest.fixture
def store(evergreen_home: Path) -> ArtifactStore:
    return ArtifactStore(str(evergreen_home / "artifacts"))


def revision(family: BaseFamily) -> str:
    return current_revision(family, Path("."), Settings.from_env())


def built(family: BaseFamily, store: ArtifactStore, now: str | None = None) -> Any:
    return build_base(now or revision(family), [family], Path("."), Settings.from_env(), store)


def test_a_revision_is_what_can_be_known(provider: Copycat) -> None:
    first = revision(provider.family())
    assert revision(provider.family()) == first, "the time in the list is no part of it"
    assert revision(provider.family(per_1000_prompt_tokens=9.0, seconds=1.0, max_requests=3)) == first
    assert revision(provider.family(revision="2024-08-06")) != first
    provider.listing = {"id": "copycat-2024-05-01", "owned_by": "tests", "max_model_len": 4096}
    assert revision(provider.family()) != first, "the provider lists another model by this name"
    provider.listing = None
    assert revision(provider.family()).startswith("copycat@"), "a provider need not list its models"
    assert provider.chats == 0, "looking is free"


def test_the_probe_learns_what_the_provider_takes(provider: Copycat, store: ArtifactStore) -> None:
    made = built(provider.family(), store)
    assert all(finding.passed for finding in made.findings.values())
    assert made.manifest["dialect"] == {
        "limit": "max_tokens",
        "optional": ["temperature", "seed", "stream_options"],
    }
    assert 3 < made.manifest["bytes_per_token"] < 8, "words of English, and a space"
    asked = provider.chats
    assert built(provider.family(), store).reused and provider.chats == asked

    provider.refuses = {"max_tokens", "seed", "stream_options"}
    picky = built(provider.family(per_1000_answer_tokens=3.0), store)
    assert picky.manifest["dialect"] == {"limit": "max_completion_tokens", "optional": ["temperature"]}
    assert picky.manifest["source"]["per_1000_answer_tokens"] == 3.0, "a new price is a new artifact"
    assert picky.manifest["revision"] == made.manifest["revision"], "of the same revision"
    assert "stream_options" in picky.findings["chat_template"].description


def test_keys_are_nowhere(provider: Copycat, store: ArtifactStore, evergreen_home: Path) -> None:
    made = built(provider.family(), store)
    assert made.manifest["source"]["key"] == KEY_NAME
    provider.failures = [403]
    with pytest.raises(BaseModelError, match=r"status 403 \(the key in environment variable TEST") as error:
        built(provider.family(context_length=1000), store)
    assert KEY not in str(error.value) and "***" in str(error.value)
    assert "Bearer" in str(error.value), "the provider repeated the header"
    files = [path for path in evergreen_home.rglob("*") if path.is_file()]
    assert files and not any(KEY.encode() in path.read_bytes() for path in files)
    assert KEY not in repr(HubAccess(token=KEY))


@pytest.mark.parametrize(
    ("failure", "message", "unavailable"),
    [
        ([500] * 3, "/v1/chat/completions: status 500: failed on demand", True),
        ([429] * 3, "status 429", True),
        (["garbage"] * 3, "status 200: expected JSON, found '<html>", True),
        ([{"choices": []}], r"choices: expected a list with an answer, found \[\]", False),
        ([{"choices": [{"message": {"content": 7}}]}], "choices.0.message.content: expected text", False),
        ([{"usage": None}], "usage: expected an object", False),
        ([{"usage": {"prompt_tokens": "5"}}], "usage.prompt_tokens: expected a whole number", False),
        ([404], "status 404", False),
    ],
)
def test_what_is_wrong_is_named(
    provider: Copycat,
    store: ArtifactStore,
    failure: list[Any],
    message: str,
    unavailable: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ml_assets.engine.hosted.FIRST_WAIT", 0.01)
    family = provider.family()
    now = revision(family)
    provider.failures = failure
    with pytest.raises(BaseModelError, match=message) as error:
        built(family, store, now)
    assert provider.url in str(error.value)
    assert isinstance(error.value, SourceUnavailable) == unavailable
    assert store.recall("base_model", "x" * 64) is None


def test_failures_that_pass_are_waited_out(provider: Copycat, store: ArtifactStore) -> None:
    provider.failures, provider.retry_after = [429, 503], "0"
    assert built(provider.family(), store).manifest["identity"]


def test_a_wrong_key_no_key_and_no_server(provider: Copycat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_NAME, "sk-wrong")
    with pytest.raises(BaseModelError, match=r"/models: status 401 \(the key in environment variable") as e:
        revision(provider.family())
    assert "sk-wrong" not in str(e.value)
    monkeypatch.setenv(KEY_NAME, "sk-two\nlines")
    with pytest.raises(BaseModelError, match="expected printable characters") as e:
        revision(provider.family())
    assert "sk-two" not in str(e.value)
    monkeypatch.delenv(KEY_NAME)
    with pytest.raises(BaseModelError, match=f"environment variable {KEY_NAME}: expected the API key"):
        revision(provider.family())
    with pytest.raises(SourceUnavailable, match=r"127\.0\.0\.1:1/v1/models: not reachable"):
        revision(provider.family(url="http://127.0.0.1:1/v1", key=None))
    monkeypatch.setenv(KEY_NAME, KEY)
    with pytest.raises(BaseModelError, match="expected the model 'other', found copycat-2024-05-01"):
        revision(provider.family(model="other"))


def test_a_slow_server_does_not_hold_up_a_sensor(
    provider: Copycat, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ml_assets.engine.hosted.FIRST_WAIT", 0.01)
    family = provider.family(seconds=0.3, attempts=2)
    now = revision(family)
    provider.failures = ["slow", "slow"]
    with pytest.raises(SourceUnavailable, match="no answer in time: ReadTimeout"):
        built(family, store, now)


def test_another_revision_is_refused(provider: Copycat, store: ArtifactStore) -> None:
    now = revision(provider.family())
    provider.listing = {"id": "copycat-2024-05-01", "owned_by": "somebody else"}
    with pytest.raises(BaseModelError, match="serves another revision of copycat-2024-05-01 now: material"):
        built(provider.family(), store, now)


def test_materialized_as_any_base_model(provider: Copycat, evergreen_home: Path) -> None:
    family = provider.family()
    asset = build_base_model_asset([family], Path("."))
    artifacts = ArtifactStoreResource(url=str(evergreen_home / "artifacts"))
    with dg.instance_for_test() as instance:
        instance.add_dynamic_partitions(str(BASE_MODELS.name), [revision(family)])
        result = dg.materialize(
            [asset],
            partition_key=revision(family),
            instance=instance,
            resources={
                "artifact_store": artifacts,
                "base_model_hub": BaseModelHub(),
                "io_manager": ArtifactRefIOManager(root=str(evergreen_home / "refs")),
            },
            raise_on_error=False,
        )
        assert result.success
        [event] = result.asset_materializations_for_node("base_model")
        facts = {r.data["fact"]: r.data["value"] for r in event.metadata["facts"].records}  # type: ignore[union-attr]
        assert facts["key"] == f"environment variable {KEY_NAME}"
        assert facts["price of 1,000 answer tokens"] == "2"
        checks = result.get_asset_check_evaluations()
        assert len(checks) == 4 and all(check.passed for check in checks)
        assert KEY not in json.dumps([str(event) for event in result.all_events])
