"""Runs the arms of an evaluation on a loaded base, and turns answers into one line per row.

An arm is a way to get answers: the bare base without examples (`zero_shot`) or with some (`few_shot`), the
candidate (`adapter`), and what serves today (`champion`). Answers are kept, row by row, by everything that
they depend on: a retrain does not repeat the base arms, a candidate that became champion is not asked again,
and of a dataset that grew only the new rows are asked.
"""

import datetime
import json
import logging
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ml_assets.artifacts import ArtifactError, ArtifactStore, canonical_json, sha256_bytes
from ml_assets.datasets.snapshot import normalize
from ml_assets.engine.examples import Examples, put_before
from ml_assets.engine.hosted import HostedModel, asked_for_labels, exact_label
from ml_assets.eval_reports.metrics import MetricError, metric_name, right_from, row_scores
from ml_assets.eval_reports.value import is_refused
from ml_assets.spec import EvaluationSpec, PromptSpec

if TYPE_CHECKING:
    from ml_assets.engine.loading import Base

    AnyBase = Base | HostedModel

_log = logging.getLogger(__name__)

ArmName = Literal["zero_shot", "few_shot", "adapter", "champion"]
ANSWERS = "answers"
ANSWERS_KEPT = 20_000
"""Of one arm; those that were asked last."""
RUNNER_VERSION = "2"
"""Raise when the same inputs would give other answers or other lines."""

Message = dict[str, str]
Row = dict[str, Any]


class EvaluationError(ValueError):
    """Rows that can't be evaluated; the message names the file or row and what was expected."""


@dataclass(frozen=True)
class Answer:
    """What one arm answered to one row. `finished`: it ended its turn within the tokens allowed. `share`: of
    the seconds that it and those asked with it took until `at` (ISO 8601, UTC)."""

    text: str
    prompt_tokens: int
    answer_tokens: int
    finished: bool
    share: float = field(default=0.0, compare=False)
    at: str = field(default="", compare=False)


def now() -> str:
    """ISO 8601 in UTC, which sorts."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")


def seconds_since(answers: Sequence[Answer], at: str) -> float:
    """What those of the answers took that were given at this time or later."""
    return sum(answer.share for answer in answers if answer.at >= at)


@dataclass(frozen=True)
class Arm:
    """One way to get answers: `adapter` is a name attached to the base, `identity` the digest of its artifact
    (both None for the bare base), `examples` are training rows shown in the prompt, `labels` what it chooses
    its answers from (None: as the evaluation says; none: it generates them), `shots` the examples of an
    adapter that has them instead of weights."""

    name: ArmName
    adapter: str | None = None
    identity: str | None = None
    examples: Sequence[Mapping[str, Any]] = ()
    labels: Sequence[str] | None = None
    shots: Examples | None = None


# -- rows ----------------------------------------------------------------------------------------------


def select_rows(rows: Sequence[Mapping[str, Any]], max_rows: int | None) -> list[Mapping[str, Any]]:
    """The first `max_rows` by hash: a random sample that stays the same as data grows, but for its end."""
    return sorted(rows, key=lambda row: row["_row"])[:max_rows]


def load_must_pass(path: Path, columns: Sequence[str]) -> list[Row]:
    """Rows of a JSONL file that every candidate must get right, each with its hash in `_row`.

    Raises EvaluationError that names file and line when one is not a JSON object with `columns`.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold other line separators
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: expected a readable JSONL file of must-pass rows: {error}") from error
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise EvaluationError(f"{path}, line {number}: expected a JSON object: {error}") from error
        if not isinstance(row, dict):
            raise EvaluationError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
        missing = [column for column in columns if row.get(column) is None]
        if missing:
            raise EvaluationError(
                f"{path}, line {number}: column {missing[0]!r} is missing, has {sorted(row)}"
            )
        row = {column: normalize(value) for column, value in row.items()}  # as in a dataset
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise EvaluationError(
                f"{path}, line {number}: expected text, found half of a surrogate pair: {error}"
            ) from error
        key = sha256_bytes(canonical_json({column: row[column] for column in columns}))
        rows[key] = {**row, "_row": key}
    if not rows:
        raise EvaluationError(f"{path}: expected at least one must-pass row, found none")
    return list(rows.values())


def choose_examples(
    train_rows: Sequence[Mapping[str, Any]], prompt: PromptSpec, evaluation: EvaluationSpec, seed: int = 0
) -> list[Mapping[str, Any]]:
    """Training rows for the few-shot prompt, the same for all evaluated rows so that the prefix is shared.

    Each adds what the others lack: a label not shown yet (classification), then values of segment columns
    not shown yet; among equals the seed decides.
    """
    from ml_assets.engine.prompting import render_target

    pool = sorted(train_rows, key=lambda row: row["_row"])
    random.Random(seed).shuffle(pool)
    chosen: list[Mapping[str, Any]] = []
    seen: set[tuple[str, str]] = set()

    def traits(row: Mapping[str, Any]) -> set[tuple[str, str]]:
        found = {(column, str(row.get(column))) for column in evaluation.segments}
        if evaluation.task == "classification":
            found.add(("", render_target(prompt, row)))
        return found

    while pool and len(chosen) < evaluation.few_shot:
        best = max(range(len(pool)), key=lambda i: (len(traits(pool[i]) - seen), -i))
        seen |= traits(pool[best])
        chosen.append(pool.pop(best))
    return chosen


def build_messages(
    prompt: PromptSpec | Mapping[str, Any],
    row: Mapping[str, Any],
    examples: Sequence[Mapping[str, Any]] = (),
) -> list[Message]:
    """System message, if there is one, the examples as earlier turns, and the row's question."""
    from ml_assets.engine.prompting import render_messages, render_target

    shown = [(render_messages(prompt, row)[-1]["content"], render_target(prompt, row)) for row in examples]
    return [dict(message) for message in put_before(render_messages(prompt, row), shown)]


def default_new_tokens(
    base: "AnyBase", prompt: PromptSpec | Mapping[str, Any], train_rows: Sequence[Mapping[str, Any]]
) -> int:
    """A quarter more than the tokens of the longest training target."""
    from ml_assets.engine.prompting import render_target

    targets = {render_target(prompt, row) for row in train_rows}
    if not targets:
        raise EvaluationError("the dataset has no training rows, so max_new_tokens must be given")
    return math.ceil(1.25 * max(base.count_answer(text) for text in targets))


# -- answers -------------------------------------------------------------------------------------------


def answer(
    base: "AnyBase",
    conversations: Sequence[Sequence[Message]],
    names: Sequence[str],
    max_new_tokens: int,
    arm: Arm,
    *,
    scope: str = "",
    store: ArtifactStore | None = None,
    compute: str = "",
    kept_before: list[Answer] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Answer], list[float] | None]:
    """Answers of one arm, greedy or the most probable of its labels, and seconds of each that was not kept
    from an earlier time (None when all were).

    `names` are row hashes for messages, `scope` says whose answers are kept together, `compute` is the
    hardware class, on which rounding depends. `kept_before` gets the answers that were kept.
    Raises EvaluationError that names the row whose prompt leaves no room for an answer, HostedError where a
    hosted model is asked.
    """
    labels = list(arm.labels or ())
    key = sha256_bytes(
        canonical_json(
            {
                "version": RUNNER_VERSION,
                "base": base.manifest["identity"],
                "adapter": arm.identity,
                "labels": labels,
                "scope": scope,
                "compute": "" if isinstance(base, HostedModel) else compute,
            }
        )
    )
    kept = _kept_answers(store, key) if store else {}
    asked = [sha256_bytes(canonical_json(list(messages))) for messages in conversations]
    found = {
        digest: kept[digest][0] for digest in asked if digest in kept and _holds(kept[digest], max_new_tokens)
    }
    if kept_before is not None:
        kept_before += found.values()
    new = {
        digest: i for i, digest in enumerate(asked) if digest not in found
    }  # the same question: asked once
    seconds: list[float] | None = None
    if new:
        unknown = [conversations[i] for i in new.values()]
        started = time.perf_counter()
        if isinstance(base, HostedModel):
            answers, seconds = _ask(base, unknown, max_new_tokens, labels, on_progress)
        else:
            rows = [names[i] for i in new.values()]
            answers, seconds = _compute(base, unknown, rows, max_new_tokens, arm, labels, on_progress)
        share, at = (time.perf_counter() - started) / len(new), now()
        answers = [replace(answer, share=round(share, 6), at=at) for answer in answers]
        found |= dict(zip(new, answers, strict=True))
        if store:
            added = {digest: (found[digest], max_new_tokens) for digest in new}
            _keep_answers(
                store, key, {digest: entry for digest, entry in kept.items() if digest not in added} | added
            )
    return [found[digest] for digest in asked], seconds


def _holds(kept: tuple[Answer, int], max_new_tokens: int) -> bool:
    """Whether an answer that was given within another limit of tokens would be the same within this one."""
    answer, limit = kept
    return limit == max_new_tokens or (answer.finished and answer.answer_tokens < max_new_tokens)


def _kept_answers(store: ArtifactStore, key: str) -> dict[str, tuple[Answer, int]]:
    """Answers by the digest of the conversation, with the limit of tokens that each was given in."""
    try:
        known = store.recall(ANSWERS, key)
        text = (store.open(known[0]) / "answers.jsonl").read_text(encoding="utf-8") if known else ""
    except ArtifactError as error:
        _log.warning("asked again, because the answers that were kept are damaged: %s", error)
        return {}
    lines = [json.loads(line) for line in text.split("\n") if line]
    return {line["asked"]: (Answer(**line["answer"]), line["limit"]) for line in lines}


def _keep_answers(store: ArtifactStore, key: str, entries: Mapping[str, tuple[Answer, int]]) -> None:
    """Keep the last of `entries` for another time."""
    text = "\n".join(
        json.dumps(
            {"asked": digest, "limit": limit, "answer": vars(answer)}, sort_keys=True, ensure_ascii=False
        )
        for digest, (answer, limit) in list(entries.items())[-ANSWERS_KEPT:]
    )
    store.remember(ANSWERS, key, store.publish(ANSWERS, {"answers.jsonl": text.encode()}), {})


def _ask(
    base: HostedModel,
    conversations: Sequence[Sequence[Message]],
    max_new_tokens: int,
    labels: list[str],
    on_progress: Callable[[int, int], None] | None,
) -> tuple[list[Answer], list[float] | None]:
    if labels:
        conversations = [
            [dict(message) for message in asked_for_labels(messages, labels)] for messages in conversations
        ]
        max_new_tokens = max(max_new_tokens, *(base.count_answer(label) for label in labels))
    replies, new = base.answers(conversations, max_new_tokens, on_progress)
    answers = [
        Answer(
            exact_label(reply.text, labels) if labels else reply.text,
            reply.prompt_tokens,
            reply.answer_tokens,
            reply.finish_reason == "stop",
        )
        for reply in replies
    ]
    return answers, [reply.seconds for reply in replies] if new else None


def _compute(
    base: "Base",
    conversations: Sequence[Sequence[Message]],
    names: Sequence[str],
    max_new_tokens: int,
    arm: Arm,
    labels: list[str],
    on_progress: Callable[[int, int], None] | None,
) -> tuple[list[Answer], list[float]]:
    prompts = [base.chat.prompt_ids(messages) for messages in conversations]
    choices = [base.chat.target_ids(label) for label in labels]
    max_new_tokens = max(map(len, choices), default=max_new_tokens)
    for name, ids in zip(names, prompts, strict=True):
        if len(ids) + max_new_tokens > base.context_length:
            raise EvaluationError(
                f"row {name}: the prompt of arm {arm.name} has {len(ids)} tokens; with {max_new_tokens} "
                f"of answer it exceeds the {base.context_length} of {base.manifest['revision']}'s context"
            )
    with base.active(arm.adapter):
        if labels:
            return _choose(base, prompts, labels, choices)
        return _generate(base, prompts, max_new_tokens, on_progress)


def _generate(
    base: "Base",
    prompts: list[list[int]],
    max_new_tokens: int,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[list[Answer], list[float]]:
    from ml_assets.engine.generation import generate

    completions = generate(base, prompts, max_new_tokens, on_progress=on_progress)
    answers = [
        Answer(c.text, c.prompt_tokens, len(c.token_ids), c.finish_reason == "stop") for c in completions
    ]
    return answers, [completion.seconds for completion in completions]


def _choose(
    base: "Base", prompts: list[list[int]], labels: list[str], choices: list[list[int]]
) -> tuple[list[Answer], list[float]]:
    from ml_assets.engine.scoring import choose_labels

    start = time.perf_counter()
    chosen = choose_labels(base, prompts, choices)
    each = (time.perf_counter() - start) / max(1, len(prompts))
    answers = [
        Answer(labels[i].strip(), len(prompt), len(choices[i]) - 1, True)
        for prompt, i in zip(prompts, chosen, strict=True)
    ]
    return answers, [each] * len(answers)


# -- lines ---------------------------------------------------------------------------------------------


def evaluated_rows(
    arm: str,
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[str],
    expected: Sequence[str],
    answers: Sequence[Answer],
    evaluation: EvaluationSpec,
    sampled: Sequence[bool],
    must_pass: Sequence[bool],
    failed: Mapping[str, str] | None = None,
) -> list[Row]:
    """One line per row: the dicts of rows.jsonl. `failed` says of rows that were wrong in production whether
    they were `trained` on or `held_out`. Raises MetricError that names the row."""
    metrics = evaluation.resolved_metrics()
    scorers = row_scores(metrics, evaluation.task)
    decides = metric_name(metrics[0])
    lines = []
    for i, (row, found) in enumerate(zip(rows, answers, strict=True)):
        try:
            scores = {name: float(score(expected[i], found.text, row)) for name, score in scorers.items()}
        except MetricError as error:
            raise MetricError(f"row {row['_row']}: {error}") from error
        except Exception as error:
            raise MetricError(
                f"row {row['_row']}: a metric failed: {type(error).__name__}: {error}"
            ) from error
        lines.append(
            {
                "row": row["_row"],
                "arm": arm,
                "prompt": prompts[i],
                "expected": expected[i],
                "answer": found.text,
                "scores": scores,
                "right": scores[decides] >= right_from(decides),
                "refused": is_refused(found.text, evaluation.value),
                "segments": {column: str(row.get(column)) for column in evaluation.segments},
                "cluster": str(row.get(evaluation.cluster)) if evaluation.cluster else None,
                "must_pass": must_pass[i],
                "sampled": sampled[i],
                **({"failed": failed[row["_row"]]} if failed and row["_row"] in failed else {}),
                "prompt_tokens": found.prompt_tokens,
                "answer_tokens": found.answer_tokens,
                "finished": found.finished,
            }
        )
    return lines


def evaluate(
    base: "AnyBase",
    prompt: PromptSpec,
    evaluation: EvaluationSpec,
    rows: Sequence[Mapping[str, Any]],
    train_rows: Sequence[Mapping[str, Any]],
    arms: Sequence[Arm],
    *,
    must_pass: Sequence[Mapping[str, Any]] = (),
    failures: Sequence[Mapping[str, Any]] = (),
    asked_with: PromptSpec | Mapping[str, Any] | None = None,
    store: ArtifactStore | None = None,
    compute: str = "",
    kept_before: list[Answer] | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> tuple[list[Row], dict[str, list[float] | None]]:
    """Lines of every arm (in order of arm, then row hash), and seconds of the answers that were not kept from
    an earlier time, by arm (None: all were).

    `rows` are the selected evaluation rows. `asked_with` is the prompt put to the model when it is not the
    customization's own (a champion was trained on its own); what is expected always follows `prompt`.
    `failures` are rows of either side of the dataset that were answered wrong in production. `kept_before`
    gets the answers that were kept.
    """
    from ml_assets.engine.prompting import render_target

    sampled = {row["_row"] for row in rows}
    questions = {question_of(prompt, row): row["_row"] for row in rows}
    chosen: dict[str, Mapping[str, Any]] = {row["_row"]: row for row in rows}
    required: set[str] = set()
    for row in must_pass:  # one that is an evaluation row as well is evaluated once
        key = questions.get(question_of(prompt, row), row["_row"])
        required.add(key)
        chosen.setdefault(key, row)
    failed: dict[str, str] = {}
    for row in failures:
        key = questions.get(question_of(prompt, row), row["_row"])
        failed[key] = "trained" if row["_split"] == "train" else "held_out"
        chosen.setdefault(key, row)
    ordered = [chosen[key] for key in sorted(chosen)]
    if not ordered:
        raise EvaluationError("there are no evaluation rows")
    asked = asked_with or prompt
    max_new_tokens = evaluation.max_new_tokens or default_new_tokens(base, prompt, train_rows)
    expected = [render_target(prompt, row) for row in ordered]
    labels = sorted({render_target(prompt, row) for row in train_rows})
    if evaluation.answer_by == "generation":
        labels = []
    scope = sha256_bytes(canonical_json(asked if isinstance(asked, Mapping) else asked.model_dump()))
    lines: list[Row] = []
    seconds: dict[str, list[float] | None] = {}
    for arm in arms:
        conversations = [build_messages(asked, row, arm.examples) for row in ordered]
        if arm.shots:
            conversations = [_shown(base, arm.shots, messages, max_new_tokens) for messages in conversations]
        answers, seconds[arm.name] = answer(
            base,
            conversations,
            [row["_row"] for row in ordered],
            max_new_tokens,
            arm if arm.labels is not None else replace(arm, labels=labels),
            scope=scope,
            store=store,
            compute=compute,
            kept_before=kept_before,
            on_progress=(lambda done, total, name=arm.name: on_progress(name, done, total))
            if on_progress
            else None,
        )
        found = evaluated_rows(
            arm.name,
            ordered,
            [messages[-1]["content"] for messages in conversations],
            expected,
            answers,
            evaluation,
            [row["_row"] in sampled for row in ordered],
            [row["_row"] in required for row in ordered],
            failed,
        )
        if isinstance(base, HostedModel):  # its price is the provider's, whatever serving costs here
            found = [
                line | {"token_cost": base.cost(line["prompt_tokens"], line["answer_tokens"])}
                for line in found
            ]
        lines += found
    return lines, seconds


def question_of(prompt: PromptSpec, row: Mapping[str, Any]) -> tuple[str, str]:
    """What makes two rows the same to ask: (prompt, answer)."""
    from ml_assets.engine.prompting import render_messages, render_target

    return json.dumps(render_messages(prompt, row)), render_target(prompt, row)


def _shown(
    base: "AnyBase", shots: Examples, messages: Sequence[Message], max_new_tokens: int
) -> list[Message]:
    room = base.context_length - max(0, max_new_tokens - shots.answer_tokens)
    found = shots.before(messages, base.count_prompt, room)
    return [dict(message) for message in found]


def fitting_examples(
    base: "AnyBase",
    prompt: PromptSpec,
    rows: Sequence[Mapping[str, Any]],
    examples: Sequence[Mapping[str, Any]],
    max_new_tokens: int,
) -> list[Mapping[str, Any]]:
    """As many of the first examples as leave room in the context for every row and its answer."""
    fitting = list(examples)
    while fitting:
        longest = max(base.count_prompt(build_messages(prompt, row, fitting)) for row in rows)
        if longest + max_new_tokens <= base.context_length:
            break
        fitting.pop()
    return fitting


# -- forgetting ----------------------------------------------------------------------------------------


def neutral_texts() -> list[str]:
    """Short passages that have nothing to do with any customization."""
    text = Path(__file__).with_name("neutral.txt").read_text(encoding="utf-8")
    return [" ".join(passage.split()) for passage in text.split("\n\n")]


def forgetting(base: "Base", adapter: str) -> float:
    """Rise of the negative log-likelihood of neutral text through an adapter, nats per token."""
    from ml_assets.engine.scoring import text_nll

    texts = neutral_texts()
    with base.active(None):
        without = text_nll(base, texts)
    with base.active(adapter):
        return text_nll(base, texts) - without
