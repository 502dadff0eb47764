"""Where artifacts live, and how assets hand each other references to them."""

import json
from pathlib import Path
from typing import Any, get_origin
from urllib.parse import quote

import dagster as dg
from pydantic import Field

from ml_assets.artifacts import ArtifactRef, ArtifactStore, write_atomic
from ml_assets.settings import Settings

# The type of every output that is an artifact. An asset with checks must name it (`dagster_type=`): from
# the annotation MaterializeResult, Dagster takes such an asset to have no value. Registered, so that inputs
# annotated ArtifactRef have the same type.
ARTIFACT_REF = dg.PythonObjectDagsterType(ArtifactRef, description="Kind and digest of an artifact.")
dg.make_python_type_usable_as_dagster_type(ArtifactRef, ARTIFACT_REF)


class ArtifactStoreResource(dg.ConfigurableResource):
    """The content-addressed artifact store of this deployment."""

    url: str = Field(
        default_factory=lambda: Settings.from_env().artifacts_url,
        description="Local directory or fsspec URL (s3://..., gs://...).",
    )
    cache: str = Field(
        default_factory=lambda: str(Settings.from_env().artifact_cache),
        description="Local directory for copies of remote artifacts.",
    )

    def store(self) -> ArtifactStore:
        return ArtifactStore(self.url, Path(self.cache))


class ArtifactRefIOManager(dg.ConfigurableIOManager):
    """Keeps the `ArtifactRef` that an asset returned: `<root>/<asset key>/<partition>.json`.

    The files are small JSON notes, replaced atomically; payloads stay in the artifact store. The folder is
    local: code locations on several machines that share a remote artifact store need it on a shared disk.

    An input annotated `ArtifactRef` gets the one reference of its partition. An input annotated
    `dict[str, ArtifactRef]`, or any input of an unpartitioned asset on a partitioned one, gets
    {partition key: reference} of the mapped partitions that were materialized, possibly none.
    """

    root: str = Field(
        default_factory=lambda: str(Settings.from_env().refs), description="Local directory for the notes."
    )

    def handle_output(self, context: dg.OutputContext, obj: Any) -> None:
        if not isinstance(obj, ArtifactRef):
            name = context.asset_key.to_user_string()
            raise TypeError(f"asset {name}: expected an ArtifactRef, got {type(obj).__name__}")
        note = json.dumps({"kind": obj.kind, "digest": obj.digest}).encode()
        for partition in context.asset_partition_keys if context.has_asset_partitions else [None]:
            write_atomic(self._path(context.asset_key, partition), note)

    def load_input(self, context: dg.InputContext) -> ArtifactRef | dict[str, ArtifactRef]:
        """Raises FileNotFoundError that names the asset to materialize, ValueError when a note is damaged."""
        key = context.asset_key
        if not context.has_asset_partitions:
            return self.load(key)
        partitions = list(context.asset_partition_keys)
        annotation = context.dagster_type.typing_type
        one = len(partitions) == 1
        collects = context.step_context.entity_partitions_def is None or get_origin(annotation) is dict
        if one and (annotation is ArtifactRef or not collects):
            return self.load(key, partitions[0])
        if annotation is ArtifactRef or not collects:
            raise TypeError(
                f"input {context.name!r} asks for {len(partitions)} partitions of {key.to_user_string()}: "
                "annotate it dict[str, ArtifactRef]"
            )
        return {p: self.load(key, p) for p in partitions if self._path(key, p).exists()}

    def load(self, key: dg.AssetKey, partition: str | None = None) -> ArtifactRef:
        """The reference last stored for an asset (and partition)."""
        path = self._path(key, partition)
        name = key.to_user_string() + (f", partition {partition}" if partition is not None else "")
        try:
            note = json.loads(path.read_bytes())
            return ArtifactRef(note["kind"], note["digest"])
        except FileNotFoundError as error:
            raise FileNotFoundError(f"materialize asset {name} first: {path} does not exist") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: expected a reference to an artifact ({error}); materialize {name} again"
            ) from error

    def _path(self, key: dg.AssetKey, partition: str | None) -> Path:
        # quoted names hold neither '/' nor '@', so no partition can leave its folder or be taken for the note
        # of an unpartitioned asset
        name = "@unpartitioned" if partition is None else quote(partition, safe="")
        return Path(self.root).joinpath(*(quote(part, safe="") for part in key.path), f"{name}.json")
