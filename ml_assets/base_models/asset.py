"""The `base_model` asset: one partition for each base revision."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import dagster as dg

from ml_assets.base_models.build import KIND, BuiltBase, build_base
from ml_assets.base_models.conversion import CONVERSION_VERSION
from ml_assets.base_models.identity import BaseModelError
from ml_assets.base_models.partitions import BASE_MODELS
from ml_assets.base_models.sources import SourceUnavailable
from ml_assets.code_link import code_link
from ml_assets.engine.hosted import is_hosted
from ml_assets.spec import BaseFamily
from resources.artifact_store import ARTIFACT_REF, ArtifactStoreResource
from resources.base_model_hub import BaseModelHub

CHECKS = {
    "finite_logits": "A forward pass over a short text gives finite numbers.",
    "better_than_chance": "Plain English is less surprising to the model than random tokens would be: its "
    "weights were read in the right order.",
    "tokenizer_round_trip": "Umlauts, other scripts, emoji and JSON survive encoding and decoding.",
    "chat_template": "The chat template renders, and a conversation begins with its own prompt.",
}
BLOCKING = frozenset({"finite_logits"})


def build_base_model_asset(families: Sequence[BaseFamily], root: Path) -> dg.AssetsDefinition:
    """The asset `base_model` for the declared families; relative paths of their sources start at `root`."""
    listing = "\n".join(
        f"- `{family.name}` ({family.source.kind}) {family.description}".rstrip() for family in families
    )

    @dg.asset(
        name="base_model",
        partitions_def=BASE_MODELS,
        dagster_type=ARTIFACT_REF,
        group_name="base_models",
        kinds={"transformers", "safetensors"},
        metadata=code_link(),
        code_version=CONVERSION_VERSION,
        pool="device",
        retry_policy=dg.RetryPolicy(max_retries=2, delay=10, backoff=dg.Backoff.EXPONENTIAL),
        description="A base model at one revision, `family@<12 hex of its content hash>`: verified, "
        f"converted once to bf16 safetensors, probed.\n\nDeclared families:\n{listing}",
        check_specs=[
            dg.AssetCheckSpec(
                name,
                asset="base_model",
                description=text,
                blocking=name in BLOCKING,
                partitions_def=BASE_MODELS,
            )
            for name, text in CHECKS.items()
        ],
    )
    def base_model(
        context: dg.AssetExecutionContext,
        artifact_store: ArtifactStoreResource,
        base_model_hub: BaseModelHub,
    ) -> dg.MaterializeResult:
        try:
            built = build_base(
                context.partition_key,
                families,
                root,
                base_model_hub.settings(),
                artifact_store.store(),
                base_model_hub.access(),
                context.log.info,
            )
        except (BaseModelError, OSError) as error:
            raise dg.Failure(str(error), allow_retries=isinstance(error, SourceUnavailable)) from error
        return dg.MaterializeResult(
            value=built.ref,
            data_version=dg.DataVersion(built.ref.digest),
            metadata=_metadata(built, artifact_store.store().location(built.ref)),
            check_results=list(_check_results(built)),
        )

    return base_model


def _check_results(built: BuiltBase) -> Iterator[dg.AssetCheckResult]:
    for name in CHECKS:
        finding = built.findings[name]
        yield dg.AssetCheckResult(
            check_name=name,
            passed=finding.passed,
            description=finding.description,
            severity=dg.AssetCheckSeverity.ERROR if name in BLOCKING else dg.AssetCheckSeverity.WARN,
        )


def _metadata(built: BuiltBase, location: str) -> dict[str, dg.MetadataValue]:
    manifest = built.manifest
    if is_hosted(manifest):
        return _hosted_metadata(built, location)
    facts = {
        "architecture": manifest["architecture"],
        "parameters": f"{manifest['parameters']:,}",
        "context length": f"{manifest['context_length']:,} tokens",
        "vocabulary": f"{manifest['vocab_size']:,} tokens",
        "hidden size, layers": f"{manifest['hidden_size']}, {manifest['layers']}",
        "chat template": "the model's own" if manifest["chat_template"] == "model" else "plain (it has none)",
        "answers end with token": ", ".join(str(token) for token in manifest["eos_token_ids"]),
        "source": ", ".join(f"{key} {value}" for key, value in manifest["source"].items()),
        "content hash": manifest["identity"],
    }
    targets = [
        {"targets": role, "modules": ", ".join(modules) or "none found"}
        for role, modules in manifest["lora_targets"].items()
    ]
    return {
        "facts": _table([{"fact": fact, "value": value} for fact, value in facts.items()]),
        "lora_targets": _table(targets),
        "chat_template_example": dg.MetadataValue.md(f"```text\n{built.example}\n```"),
        "parameters": dg.MetadataValue.int(manifest["parameters"]),
        "context_length": dg.MetadataValue.int(manifest["context_length"]),
        "digest": dg.MetadataValue.text(built.ref.digest),
        "dagster/uri": dg.MetadataValue.text(location),
        "seconds_to_make": dg.MetadataValue.float(round(built.seconds, 2)),
        "reused": dg.MetadataValue.bool(built.reused),
    }


def _hosted_metadata(built: BuiltBase, location: str) -> dict[str, dg.MetadataValue]:
    manifest, source = built.manifest, built.manifest["source"]
    facts = {
        "URL": source["url"],
        "model": source["model"],
        "revision": source["revision"],
        "key": f"environment variable {source['key']}" if source["key"] else "none",
        "price of 1,000 prompt tokens": f"{source['per_1000_prompt_tokens']:g}",
        "price of 1,000 answer tokens": f"{source['per_1000_answer_tokens']:g}",
        "context length": f"{manifest['context_length']:,} tokens",
        "English": f"{manifest['bytes_per_token']} bytes to a token",
        "takes": ", ".join([manifest["dialect"]["limit"], *manifest["dialect"]["optional"]]),
        "content hash": manifest["identity"],
    }
    return {
        "facts": _table([{"fact": fact, "value": value} for fact, value in facts.items()]),
        "chat_template_example": dg.MetadataValue.md(f"```text\n{built.example}\n```"),
        "listed": dg.MetadataValue.json(manifest["listed"] or {}),
        "context_length": dg.MetadataValue.int(manifest["context_length"]),
        "digest": dg.MetadataValue.text(built.ref.digest),
        "dagster/uri": dg.MetadataValue.text(location),
        "seconds_to_make": dg.MetadataValue.float(round(built.seconds, 2)),
        "reused": dg.MetadataValue.bool(built.reused),
    }


def _table(rows: list[dict[str, str]]) -> dg.TableMetadataValue:
    return dg.MetadataValue.table([dg.TableRecord(dict(row)) for row in rows])


__all__ = ["KIND", "build_base_model_asset"]
