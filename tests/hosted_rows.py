"""A small customization for hosted bases: which device a sentence names."""

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ml_assets.artifacts import ArtifactRef, ArtifactStore, sha256_bytes
from ml_assets.spec import CustomizationSpec

THINGS = ["lamp", "door", "radio", "oven", "window", "heater", "fan", "gate", "pump", "shutter"]


def specification(examples: dict[str, Any] | None = None, **evaluation: Any) -> CustomizationSpec:
    return CustomizationSpec.model_validate(
        {
            "name": "things",
            "source": {"kind": "jsonl", "path": "rows.jsonl"},
            "prompt": {"system": "Name the device.", "user": "{said}", "target": "{thing}"},
            "base_models": ["copycat"],
            "examples": {"count": 3, "validation_rows": 16} | (examples or {}),
            "evaluation": {
                "task": "classification",
                "few_shot": 2,
                "max_new_tokens": 4,
                "value": {"right": 1, "per_1000_tokens": 100},
                "gate": {"margin": 0.2},
                **evaluation,
            },
        }
    )


def dataset_of(store: ArtifactStore) -> ArtifactRef:
    """60 rows: ten devices, each named six times."""
    table = [{"said": f"{i}: switch the {THINGS[i // 6]}", "thing": THINGS[i // 6]} for i in range(60)]
    for i, row in enumerate(table):
        row["_row"] = sha256_bytes(str(i).encode())
        row["_split"] = "evaluation" if i % 6 == 5 else "train"
    table.sort(key=lambda row: row["_row"])
    with store.staging("dataset") as directory:
        pq.write_table(pa.Table.from_pylist(table), directory / "rows.parquet")
        (directory / "manifest.json").write_text(json.dumps({"rows": {"train": 50, "evaluation": 10}}))
        return store.publish_directory("dataset", directory)
