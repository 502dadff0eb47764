"""One base revision from its source to a published artifact."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ml_assets.artifacts import ArtifactError, ArtifactRef, ArtifactStore, canonical_json, sha256_bytes
from ml_assets.base_models import conversion, hosted, identity, probe, sources
from ml_assets.base_models.identity import BaseModelError
from ml_assets.base_models.probe import Finding
from ml_assets.base_models.sources import HubAccess
from ml_assets.engine.hosted import Secret
from ml_assets.settings import Settings
from ml_assets.spec import BaseFamily, HostedBase

KIND = "base_model"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class BuiltBase:
    """A published base revision. `example` is a prompt as its chat template renders it, `reused` says that it
    was published before, `seconds` what making it took."""

    ref: ArtifactRef
    manifest: dict[str, Any]
    findings: dict[str, Finding]
    example: str
    seconds: float
    reused: bool


def build_base(
    revision: str,
    families: Sequence[BaseFamily],
    root: Path,
    settings: Settings,
    store: ArtifactStore,
    hub: HubAccess | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> BuiltBase:
    """Fetch, verify, convert, probe and publish the base revision `family@<12 hex>`, unless that was done.

    A published artifact that is damaged is reported through `log` and made again. Raises BaseModelError when
    the family is not declared, the source's content is not that revision, or the model cannot be used.
    """
    family = declared(revision, families)
    parts: dict[str, Any] = {"revision": revision, "conversion": conversion.CONVERSION_VERSION}
    if isinstance(family.source, HostedBase):  # its prices and limits are no part of its identity
        parts["source"] = family.source.model_dump(mode="json")
    key = sha256_bytes(canonical_json(parts))
    known = store.recall(KIND, key)
    if known is not None:
        ref, record = known
        try:
            directory = store.open(ref)
            manifest = json.loads((directory / MANIFEST).read_bytes())
            findings = {name: Finding(**finding) for name, finding in record["findings"].items()}
            return BuiltBase(ref, manifest, findings, record["example"], record["seconds"], True)
        except ArtifactError as error:
            log(f"damaged artifact, making it again: {error}")
            store.delete(ref)
    started = time.perf_counter()
    if isinstance(family.source, HostedBase):
        secret = (hub or HubAccess.from_env()).secret
        return _build_hosted(revision, family, family.source, secret, store, key, log)
    log(f"fetching {family.name} ({family.source.kind})")
    source = sources.fetch(family.source, root, settings, hub).path
    content = identity.identify(source)
    if identity.revision_key(family.name, content) != revision:
        raise BaseModelError(
            f"{revision}: hash mismatch: the content hash of {source} is {content[:12]}: a damaged copy, or "
            f"another revision, {identity.revision_key(family.name, content)}"
        )
    before = identity.stamp(source)
    with store.staging(KIND) as directory:
        log("converting to bfloat16 safetensors")
        conversion.convert(source, directory)
        if identity.stamp(source) != before:
            raise BaseModelError(f"{source}: was written to while it was converted; materialize it again")
        log("probing the model")
        model, tokenizer = conversion.load(directory)
        manifest = {
            "family": family.name,
            "revision": revision,
            "identity": content,
            "source": family.source.model_dump(mode="json", exclude_none=True),
            **probe.facts(model, tokenizer, directory),
        }
        findings = probe.findings(model, tokenizer)
        example = probe.rendered_example(tokenizer)
        del model  # it maps the files that are about to be renamed
        conversion.write_json(directory / MANIFEST, manifest)
        ref = store.publish_directory(KIND, directory)
    seconds = time.perf_counter() - started
    record = {
        "findings": {name: asdict(finding) for name, finding in findings.items()},
        "example": example,
        "seconds": seconds,
    }
    store.remember(KIND, key, ref, record)
    return BuiltBase(ref, manifest, findings, example, seconds, False)


def _build_hosted(
    revision: str,
    family: BaseFamily,
    source: HostedBase,
    secret: Secret,
    store: ArtifactStore,
    key: str,
    log: Callable[[str], None],
) -> BuiltBase:
    """Probe and publish a hosted revision: a manifest alone."""
    started = time.perf_counter()
    with sources.refused():
        probed = hosted.probe(source, secret, log)
    found = identity.revision_key(family.name, probed.manifest["identity"])
    if found != revision:
        raise BaseModelError(
            f"{revision}: {source.url} serves another revision of {source.model} now: materialize {found}"
        )
    manifest = {"family": family.name, "revision": revision, **probed.manifest}
    ref = store.publish(KIND, {MANIFEST: canonical_json(manifest) + b"\n"})
    seconds = time.perf_counter() - started
    findings = {name: asdict(finding) for name, finding in probed.findings.items()}
    store.remember(KIND, key, ref, {"findings": findings, "example": probed.example, "seconds": seconds})
    return BuiltBase(ref, manifest, probed.findings, probed.example, seconds, False)


def declared(revision: str, families: Sequence[BaseFamily]) -> BaseFamily:
    """The family of a base revision. Raises BaseModelError that names the declared ones if it is none."""
    name, _ = identity.split_revision(revision)
    for family in families:
        if family.name == name:
            return family
    names = ", ".join(sorted(family.name for family in families)) or "none"
    raise BaseModelError(f"base revision {revision!r}: no base model {name!r} is declared; declared: {names}")
