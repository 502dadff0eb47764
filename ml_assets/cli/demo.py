"""The main job on the customizations of this project, from an empty data directory to a served model."""

import contextlib
import functools
import json
import os
import shlex
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
from dagster import AssetKey, AssetObservation, ComponentTree, DagsterInstance
from dagster._core.definitions.data_version import DATA_VERSION_TAG

from ml_assets.artifacts import ArtifactRef, ArtifactStore
from ml_assets.base_models.partitions import add_revisions
from ml_assets.base_models.register import register_revisions
from ml_assets.cli import supervisor
from ml_assets.cli.runs import ASSET_JOB, Dagster
from ml_assets.cli.supervisor import OperationError, print_urls
from ml_assets.customization import JOBS_FOR, BaseModels, Customization
from ml_assets.datasets.snapshot import load_rows
from ml_assets.datasets.sources import SourceError, source_version
from ml_assets.endpoints.gateway import keys
from ml_assets.endpoints.ledger import Ledger
from ml_assets.settings import Settings
from ml_assets.spec import CustomizationSpec

PRODUCED = ("dataset", "adapter", "eval_report", "endpoint")


def demo(settings: Settings) -> None:
    """Bring every customization up to date for the base models it follows, and print how to use it.

    Raises OperationError with the reason when something can't be done.
    """
    with brought_up(settings, supervisor.ROOT, clock()) as (customizations, instance, urls):
        _print_next(settings, urls, customizations, instance)


def clock() -> Callable[[str], None]:
    """Prints lines with the time since now."""
    began = time.monotonic()

    def show(text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - began), 60)
        print(f"{minutes:02d}:{seconds:02d}  {text}", flush=True)

    return show


@contextlib.contextmanager
def brought_up(
    settings: Settings, project: Path, show: Callable[[str], None]
) -> Iterator[tuple[list[CustomizationSpec], DagsterInstance, dict[str, str]]]:
    """A running deployment whose customizations (those of the project around a path) are up to date: their
    specs, its instance, and the addresses of its programs."""
    show("starting Dagster, MLflow and the gateway")
    started = supervisor.start(settings)
    state = supervisor.read_state(settings)
    urls = state["urls"] if state else supervisor.urls(settings)
    if not started:  # a customization may have been added or changed since
        supervisor.reload(urls)
    tree = ComponentTree.for_project(project)
    customizations = [component.spec for component in tree.get_all_components(Customization)]
    with DagsterInstance.from_config(str(settings.dagster_home)) as instance:
        dagster = Dagster(urls["dagster"], instance)
        show("looking at the base models and sources (the first time, they are downloaded)")
        revisions = _register(tree, instance, settings)
        _observe_sources(tree, instance, settings)
        launched = _bring_up_to_date(dagster, customizations, revisions, show)
        if not launched:
            show("nothing changed: every asset is up to date, so no run was launched")
        yield customizations, instance, urls


def _register(tree: ComponentTree, instance: DagsterInstance, settings: Settings) -> dict[str, str]:
    """Make the current base revisions partitions; {family: revision}."""
    revisions: dict[str, str] = {}
    for component in tree.get_all_components(BaseModels):
        families = component.spec.families
        found = register_revisions(
            families,
            component.origin.file.parent,
            settings,
            functools.partial(add_revisions, instance),
        )
        revisions |= {family.name: revision for family, revision in zip(families, found, strict=True)}
    return revisions


def _observe_sources(tree: ComponentTree, instance: DagsterInstance, settings: Settings) -> None:
    """Note the version of every source, so that Dagster knows which datasets are stale."""
    for component in tree.get_all_components(Customization):
        spec = component.spec
        try:
            version = source_version(spec.source, component.origin.file.parent, settings)
        except SourceError as error:
            raise OperationError(f"{spec.name}: {error}") from error
        instance.report_runless_asset_event(
            AssetObservation(AssetKey([spec.name, "source"]), tags={DATA_VERSION_TAG: version})
        )


def _bring_up_to_date(
    dagster: Dagster,
    customizations: list[CustomizationSpec],
    revisions: dict[str, str],
    show: Callable[[str], None],
) -> int:
    """Launch and follow what is missing or out of date, in order; returns the number of runs."""
    launched = 0

    def run(
        title: str, job: str, *, assets: list[AssetKey] | None = None, partition: str | None = None
    ) -> None:
        nonlocal launched
        run_id = dagster.launch(job, assets=assets, partition=partition)
        launched += 1
        show(f"{title}  {dagster.run_url(run_id)}")
        dagster.follow(run_id, lambda line: show(f"    {line}"))

    followed = [family for spec in customizations for family in spec.base_models]
    for family in dict.fromkeys(followed):
        base_model = AssetKey("base_model")
        if dagster.out_of_date([base_model], revisions[family]):
            run(
                f"base model {revisions[family]}", ASSET_JOB, assets=[base_model], partition=revisions[family]
            )
    for spec in customizations:
        assets = [AssetKey([spec.name, kind]) for kind in PRODUCED]
        for family in spec.base_models:
            stale = dagster.out_of_date(assets, revisions[family])
            if stale:
                names = ", ".join(key.path[-1] for key in stale)
                title = f"{spec.name} on {revisions[family]} (missing or out of date: {names})"
                if len(customizations) <= JOBS_FOR:
                    run(title, f"{spec.name}__main", partition=revisions[family])
                else:  # a large project has no jobs
                    run(title, ASSET_JOB, assets=assets, partition=revisions[family])
    return launched


# -- what a person does next ---------------------------------------------------------------------------


def key_path(settings: Settings) -> Path:
    return settings.home / "demo-api.key"


def demo_key(settings: Settings) -> str:
    """An API key for every customization, made once and kept in a file that only its owner can read."""
    path = key_path(settings)
    with contextlib.closing(Ledger(settings.ledger_url)) as ledger:
        if path.exists():
            key = path.read_text().strip()
            if keys.authenticate(ledger, key):
                return key
            path.unlink()
        key, _ = keys.create(ledger, ["*"], name="demo")
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(key)
    return key


def example(spec: CustomizationSpec, instance: DagsterInstance, settings: Settings) -> tuple[str, str]:
    """(what a user writes, the right answer) of the first evaluation row of the current dataset."""
    event = instance.get_latest_materialization_event(AssetKey([spec.name, "dataset"]))
    materialization = event.asset_materialization if event else None
    digest = (materialization.tags or {}).get(DATA_VERSION_TAG) if materialization else None
    if digest is None:
        raise OperationError(f"{spec.name}/dataset was never made")
    directory = ArtifactStore(settings.artifacts_url).open(ArtifactRef("dataset", digest))
    row = load_rows(directory, "evaluation")[0]
    return spec.prompt.user.format_map(row), spec.prompt.target.format_map(row)


def _ask(url: str, key: str, model: str, text: str) -> tuple[str, str]:
    """(answer, adapter that gave it). Raises OperationError with the endpoint's reason."""
    body = {"model": model, "messages": [{"role": "user", "content": text}]}
    headers = {"Authorization": f"Bearer {key}"}
    try:
        response = httpx.post(
            f"{url}/v1/chat/completions", json=body, headers=headers, timeout=120, trust_env=False
        )
        answer = response.json()
    except (httpx.HTTPError, ValueError) as error:
        raise OperationError(f"{url} does not answer: {error}") from error
    if response.status_code != 200:
        raise OperationError(f"{model} is not served: {answer.get('error', {}).get('message', answer)}")
    return answer["choices"][0]["message"]["content"], answer["system_fingerprint"]


def _print_next(
    settings: Settings,
    urls: dict[str, str],
    customizations: list[CustomizationSpec],
    instance: DagsterInstance,
) -> None:
    key = demo_key(settings)
    print("\nEach customization, asked about a row that it was not trained on:")
    command = ""
    for spec in customizations:
        text, expected = example(spec, instance, settings)
        answer, adapter = _ask(urls["gateway"], key, spec.name, text)
        print(f"  {spec.name} (adapter {adapter[:12]})")
        for label, value in (("user", text), ("answer", answer), ("right", expected)):
            print(f"    {label:7} {textwrap.shorten(value, 200)}")
        command = command or _curl(settings, urls["gateway"], spec.name, text)
    print("\nWhat runs now:")
    print_urls(urls)
    print("\nAsk the endpoint:\n" + command)
    print("\n`make down` ends it, `make up` brings it back.")


def _curl(settings: Settings, url: str, model: str, text: str) -> str:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": text}]}, ensure_ascii=False)
    authorization = f'"Authorization: Bearer $(cat {shlex.quote(str(key_path(settings)))})"'
    return (
        f"  curl {url}/v1/chat/completions \\\n    -H {authorization} \\\n"
        f"    -H 'Content-Type: application/json' \\\n    -d {shlex.quote(body)}"
    )
