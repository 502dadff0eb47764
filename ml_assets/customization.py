"""The components: a `defs.yaml` becomes one customization's assets, or the base models to follow."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import dagster as dg
import yaml
from dagster._core.definitions.definitions_load_context import DefinitionsLoadContext, DefinitionsLoadType
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition
from dagster._utils.schedules import is_valid_cron_string
from dagster._vendored.croniter.croniter import CroniterBadDateError, croniter
from pydantic import BaseModel, GetJsonSchemaHandler, RootModel

from ml_assets.adapters.asset import build_adapter_asset
from ml_assets.base_models.asset import build_base_model_asset
from ml_assets.datasets.asset import build_dataset_asset, build_source_asset
from ml_assets.datasets.sources import source_columns
from ml_assets.decisions.asset import build_decision_asset
from ml_assets.decisions.tags import CUSTOMIZATION_TAG
from ml_assets.drift_reports.asset import build_drift_report_asset
from ml_assets.endpoints.asset import build_endpoint_asset
from ml_assets.eval_reports.asset import build_eval_report_asset
from ml_assets.mistakes import (
    Mistake,
    Origin,
    SpecError,
    Steps,
    callable_mistakes,
    columns_mistakes,
    did_you_mean,
    must_pass_mistakes,
    validate,
)
from ml_assets.settings import RUN_ASSETS_VARIABLE
from ml_assets.spec import BaseModelsSpec, CustomizationSpec, PythonMetric, PythonSource
from ml_assets.traffic.asset import build_traffic_asset
from sensors.schedules import build_schedules

M = TypeVar("M", bound=BaseModel)

JOBS_FOR = 50
"""Customizations of a project up to which each has jobs of its own. Dagster resolves every job against every
asset when it loads a project, so that hundreds would take minutes; sensors then run assets without a job."""


class _Attributes(RootModel[dict[str, Any]]):
    """The attributes as written: `load` validates them, after filling in variables and with line numbers.
    To editors and `dg check yaml` it looks like the spec."""

    @classmethod
    def __get_pydantic_json_schema__(cls, _: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(cls.spec_model().__pydantic_core_schema__)

    @classmethod
    def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return _with_branches(super().model_json_schema(*args, **kwargs))

    @classmethod
    def spec_model(cls) -> type[BaseModel]:
        raise NotImplementedError


def _with_branches(schema: Any) -> Any:
    """Replace each choice, by `kind` or by type, with if/then: a validator then names what is wrong with the
    chosen branch, instead of saying that nothing fits."""
    if isinstance(schema, list):
        return [_with_branches(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    rest = {k: _with_branches(v) for k, v in schema.items() if k not in ("anyOf", "oneOf", "discriminator")}
    if discriminator := schema.get("discriminator"):
        name, mapping = discriminator["propertyName"], discriminator["mapping"]
        cases = [
            ({"properties": {name: {"const": tag}}, "required": [name]}, {"$ref": reference})
            for tag, reference in mapping.items()
        ]
        rest |= {"type": "object", "required": [name], "properties": {name: {"enum": list(mapping)}}}
    elif choices := schema.get("anyOf") or schema.get("oneOf"):
        # a reference is a block
        cases = [({"type": c.get("type", "object")}, _with_branches(c)) for c in choices]
        rest["type"] = [condition["type"] for condition, _ in cases]
    else:
        return rest
    return rest | {"allOf": [{"if": condition, "then": branch} for condition, branch in cases]}


class _CustomizationAttributes(_Attributes):
    @classmethod
    def spec_model(cls) -> type[BaseModel]:
        return CustomizationSpec


class _BaseModelsAttributes(_Attributes):
    @classmethod
    def spec_model(cls) -> type[BaseModel]:
        return BaseModelsSpec


def _read(model: type[M], attributes: BaseModel | None, context: dg.ComponentLoadContext) -> tuple[M, Origin]:
    """The validated block and where it stands. Raises SpecError."""
    raw = attributes.root if isinstance(attributes, RootModel) else {}
    tree = context.resolution_context.source_position_tree
    if tree is None:
        origin = Origin(context.path)
    else:
        block = tree.children.get("attributes", tree)
        lines: dict[Steps, int] = {}
        pending: list[tuple[Steps, Any]] = [((), block)]
        while pending:
            steps, node = pending.pop()
            lines[steps] = node.position.start.line
            pending += [((*steps, step), child) for step, child in node.children.items()]
        origin = Origin(Path(tree.position.filename), block.position.start.line, lines)
    return validate(model, raw, origin), origin


# -- scaffolding ---------------------------------------------------------------------------------------

CUSTOMIZATION_YAML = """\
type: {type}
attributes:
  name: {name}  # the model name at the endpoint
  description: What this model is for, in a sentence.
  owners: [team:ml]
  source:
    kind: jsonl  # or csv, parquet, sql, huggingface, python
    path: data/*.jsonl  # relative to this file; each row a JSON object
  prompt:  # {{column}} stands for a column of the source
    system: What the model should do with the message.
    user: "{{question}}"
    target: "{{answer}}"
  base_models: [{family}]  # families that ml_assets.BaseModels declares
  evaluation:
    task: text  # or classification, json
# docs/customization.md lists every other field with its default
"""

BASE_MODELS_YAML = """\
type: {type}
attributes:
  families:
    - name: my_base  # what customizations list under base_models
      source:
        kind: directory  # or gguf, wheel, hub
        path: /path/to/model  # holds config.json, tokenizer files and *.safetensors
"""


class CustomizationScaffolder(dg.Scaffolder):
    """Writes the smallest working defs.yaml, with the first base family that the defs folder declares."""

    def scaffold(self, request: dg.ScaffoldRequest) -> None:
        name = re.sub(r"\W+", "_", request.target_path.name.lower()).lstrip("_0123456789") or "my_model"
        target = request.target_path
        # a project may hold examples with families of their own
        defs = next((folder for folder in target.parents if folder.name == "defs"), target.parent)
        families = _declared_families(defs)
        _write(
            request,
            CUSTOMIZATION_YAML.format(
                type=request.type_name, name=name, family=families[0] if families else "my_base"
            ),
        )


class BaseModelsScaffolder(dg.Scaffolder):
    """Writes a defs.yaml that declares one base family."""

    def scaffold(self, request: dg.ScaffoldRequest) -> None:
        _write(request, BASE_MODELS_YAML.format(type=request.type_name))


def _write(request: dg.ScaffoldRequest, text: str) -> None:
    if request.scaffold_format != "yaml":
        raise ValueError(f"{request.type_name}: expected the format yaml, found {request.scaffold_format}")
    if request.append:
        with request.target_path.open("a") as file:
            file.write(f"---\n{text}")
    else:
        (request.target_path / "defs.yaml").write_text(text)


def _declared_families(folder: Path) -> list[str]:
    documents = [
        document
        for file in sorted(folder.rglob("defs.yaml"))
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
        for document in yaml.safe_load_all(file.read_text())
    ]
    return [
        family["name"]
        for document in documents
        if document and document.get("type") == "ml_assets.BaseModels"
        for family in document["attributes"]["families"]
    ]


# -- components ----------------------------------------------------------------------------------------


@dg.scaffold_with(BaseModelsScaffolder)
@dataclass(frozen=True)
class BaseModels(dg.Component):
    """The base models that customizations can follow: one asset `base_model` with a partition for each
    revision. The sensor `base_updates` notices new ones."""

    spec: BaseModelsSpec
    origin: Origin

    @classmethod
    def get_model_cls(cls) -> type[BaseModel]:
        return _BaseModelsAttributes

    @classmethod
    def load(cls, attributes: BaseModel | None, context: dg.ComponentLoadContext) -> "BaseModels":
        return cls(*_read(BaseModelsSpec, attributes, context))

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        """Raises SpecError when another file declares base models too."""
        first = next(iter(context.component_tree.get_all_components(BaseModels)), self)
        if first is not self:
            raise self.origin.error(
                [Mistake((), f"expected one ml_assets.BaseModels, found another at {first.origin.at()}")]
            )
        families, root = self.spec.families, self.origin.file.parent
        return dg.Definitions(assets=[build_base_model_asset(families, root)])


@dg.scaffold_with(CustomizationScaffolder)
@dataclass(frozen=True)
class Customization(dg.Component):
    """One adaptation of language models to one job: its source, dataset, adapters, eval reports, endpoint,
    traffic, drift reports and decisions, and its jobs: `<name>__main` brings them up to date for one base
    revision, `<name>__update` does so with an adapter trained as a decision says, `<name>__look` looks at the
    traffic, `<name>__observe` at the source."""

    spec: CustomizationSpec
    origin: Origin

    @classmethod
    def get_model_cls(cls) -> type[BaseModel]:
        return _CustomizationAttributes

    @classmethod
    def load(cls, attributes: BaseModel | None, context: dg.ComponentLoadContext) -> "Customization":
        _declare_once(context.component_tree)
        return cls(*_read(CustomizationSpec, attributes, context))

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        """Raises SpecError when the file refers to what does not exist."""
        spec, root = self.spec, self.origin.file.parent
        if _in_a_run() and not _project(context).is_needed(spec.name):
            return dg.Definitions()
        if mistakes := [*self._project_mistakes(context), *self._reference_mistakes(root)]:
            raise self.origin.error(mistakes)
        produced = [
            build_dataset_asset(spec, root),
            build_adapter_asset(spec, root),
            build_eval_report_asset(spec, root),
            build_endpoint_asset(spec),
        ]
        source, watched = (
            build_source_asset(spec, root),
            [build_traffic_asset(spec), build_drift_report_asset(spec), build_decision_asset(spec)],
        )
        jobs = {
            "main": self._job(
                "main",
                produced,
                f"Brings {spec.name} up to date for one base revision: dataset, adapter, evaluation, and the "
                "endpoint if the evaluation says so. What did not change costs nothing.",
            ),
            "update": self._job(
                "update",
                produced,
                f"What a decision starts for {spec.name}: dataset with feedback, adapter (updated from the "
                "champion, or trained from scratch), evaluation, endpoint.",
            ),
            "look": self._job(
                "look",
                watched,
                f"Looks at the traffic of {spec.name}: drift report, and what to do about it.",
            ),
            "observe": self._job(
                "observe", [source], f"Looks whether the source of {spec.name} has other rows."
            ),
        }
        return dg.Definitions(
            assets=[source, *produced, *watched],
            jobs=list(jobs.values()) if _project(context).has_jobs else [],
            schedules=build_schedules(spec, jobs),
        )

    def _job(
        self, kind: str, assets: Sequence[dg.AssetsDefinition], description: str
    ) -> UnresolvedAssetJobDefinition:
        return dg.define_asset_job(
            f"{self.spec.name}__{kind}",
            selection=dg.AssetSelection.assets(*assets),
            description=description,
            owners=self.spec.owners,
            # by this tag a sensor finds the runs of a customization in one query
            tags={CUSTOMIZATION_TAG: self.spec.name},
        )

    def _project_mistakes(self, context: dg.ComponentLoadContext) -> list[Mistake]:
        """What does not fit the other files of the project."""
        project = _project(context)
        first = project.customizations.get(self.spec.name, self)
        if first is not self:
            return [
                Mistake(
                    ("name",),
                    f"expected a name of its own, found {self.spec.name!r}, which "
                    f"{first.origin.at(('name',))} has already",
                )
            ]
        declared = project.families
        known = f"the project declares: {', '.join(declared)}" if declared else "no ml_assets.BaseModels yet"
        return [
            Mistake(
                ("base_models", index),
                f"base model {family!r} is not declared; {known}{did_you_mean(family, declared)}",
            )
            for index, family in enumerate(self.spec.base_models)
            if family not in declared
        ]

    def _reference_mistakes(self, root: Path) -> list[Mistake]:
        """Functions, columns, files and times that the YAML names and that are not there."""
        spec = self.spec
        mistakes: list[Mistake] = []
        if isinstance(spec.source, PythonSource):
            mistakes += callable_mistakes(
                spec.source.callable, ("source", "callable"), keywords=spec.source.args
            )
        for index, metric in enumerate(spec.evaluation.metrics):
            if isinstance(metric, PythonMetric):
                steps = ("evaluation", "metrics", index, "callable")
                mistakes += callable_mistakes(metric.callable, steps, positional=3)
        for index, block in enumerate(spec.schedules):
            if wrong := _cron_mistake(block.cron):
                mistakes.append(Mistake(("schedules", index, "cron"), wrong))
        # A run loads the files of all customizations again, whose data may be other data by now: that is told
        # by the dataset or the report which reads it.
        if not _in_a_run():
            mistakes += self._data_mistakes(root)
        return mistakes

    def _data_mistakes(self, root: Path) -> list[Mistake]:
        """Columns that the YAML names and that files of data lack."""
        spec = self.spec
        mistakes: list[Mistake] = []
        if look := source_columns(spec.source, root):
            available, complete = look
            named = _named_columns(spec)
            if not complete:  # a later row may have a column, but all must have those of the prompt
                every = named if not spec.dataset.max_bad_share else {}
                named = {steps: columns for steps, columns in every.items() if steps[0] == "prompt"}
            mistakes += columns_mistakes(named, available)
        if spec.evaluation.must_pass:
            mistakes += must_pass_mistakes(
                root / spec.evaluation.must_pass,
                [column for columns in spec.prompt.columns().values() for column in columns],
                ("evaluation", "must_pass"),
            )
        return mistakes


@dataclass(frozen=True)
class _Project:
    """What a customization needs to know of the other files: the first customization of each name, and the
    declared base families."""

    customizations: Mapping[str, Customization]
    families: list[str]

    @property
    def has_jobs(self) -> bool:
        return len(self.customizations) <= JOBS_FOR

    def is_needed(self, name: str) -> bool:
        """Whether the process of a run needs the customization's assets: making those of all takes longer
        than many a run. A run with assets of others (`fleet`, a user's own) may look at any."""
        named = set(filter(None, os.environ.get(RUN_ASSETS_VARIABLE, "").split(",")))
        told = bool(named) and named <= {*self.customizations, "base_model"}
        return name in named or not told


_declared: dg.ComponentTree | None = None


def _declare_once(tree: dg.ComponentTree) -> None:
    """Tell the tree where each of its components is declared. It would find out by itself, by a walk through
    all of them for each."""
    global _declared
    if _declared is not tree:
        _declared = tree
        for location, declaration in tree.find_root_decl().iterate_loc_component_decl_pairs():
            if tree.state_tracker.get_cache_data(location).component_decl is None:
                tree.state_tracker.set_cache_data(location, component_decl=declaration)


# of the project that is being loaded: each lookup visits all of its files
_newest: "tuple[dg.ComponentTree, _Project] | None" = None


def _project(context: dg.ComponentLoadContext) -> _Project:
    global _newest
    tree = context.component_tree
    if _newest is None or _newest[0] is not tree:
        customizations: dict[str, Customization] = {}
        for component in tree.get_all_components(Customization):
            customizations.setdefault(component.spec.name, component)
        families = [f.name for c in tree.get_all_components(BaseModels) for f in c.spec.families]
        _newest = tree, _Project(customizations, families)
    return _newest[1]


def _in_a_run() -> bool:
    """Whether a run's process loads again what the code location has loaded before."""
    context = DefinitionsLoadContext
    return context.is_set() and context.get().load_type is DefinitionsLoadType.RECONSTRUCTION


def _cron_mistake(cron: str) -> str | None:
    if croniter.is_valid(cron):
        try:
            croniter(cron).get_next()
        except CroniterBadDateError:
            return f"expected a time that comes, found {cron!r}, which never fires"
    return None if is_valid_cron_string(cron) else f"expected a cron expression, found {cron!r}"


def _named_columns(spec: CustomizationSpec) -> Mapping[Steps, list[str]]:
    """The columns that each place of the YAML names."""
    named: dict[Steps, list[str]] = {("prompt", part): c for part, c in spec.prompt.columns().items()}
    if spec.dataset.group_by:
        named["dataset", "group_by"] = [spec.dataset.group_by]
    if spec.evaluation.cluster:
        named["evaluation", "cluster"] = [spec.evaluation.cluster]
    return named | {
        ("evaluation", "segments", index): [column] for index, column in enumerate(spec.evaluation.segments)
    }


__all__ = ["BaseModels", "Customization", "SpecError"]
