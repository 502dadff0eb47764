"""A customization with a tiny base and a handful of rows, as artifacts; run as a program, it trains.

`python small_training.py HOME [SECONDS_BETWEEN_CHECKPOINTS]` prints one line a step, then the digest.
"""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from tiny_models import CONTEXT, tiny_model

from ml_assets.adapters.train import AdapterInputs, TrainedAdapter, open_inputs, train_adapter
from ml_assets.artifacts import ArtifactRef, ArtifactStore, sha256_bytes
from ml_assets.spec import CustomizationSpec

STEPS = 12
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def small_spec(**adapter) -> CustomizationSpec:
    recipe = {
        "rank": 4,
        "alpha": 16,
        "steps": STEPS,
        "batch_tokens": 256,
        "learning_rate": 0.02,
        "dropout": 0.1,
    }
    return CustomizationSpec.model_validate(
        {
            "name": "lights",
            "source": {"kind": "jsonl", "path": "rows.jsonl"},
            "prompt": {"user": "{said}", "target": "{meant}"},
            "base_models": ["tiny"],
            "adapter": recipe | adapter,
            "evaluation": {"task": "json"},
        }
    )


def small_base(store: ArtifactStore, seed: int = 0) -> ArtifactRef:
    """A base model artifact as `ml_assets.base_models` publishes it."""
    with store.staging("base_model") as directory:
        tiny_model("llama", directory, seed=seed)
        identity = sha256_bytes(f"tiny {seed}".encode())
        manifest = {
            "family": "tiny",
            "revision": f"tiny@{identity[:12]}",
            "identity": identity,
            "architecture": "LlamaForCausalLM",
            "context_length": CONTEXT,
            "chat_template": "model",
            "chat_template_sha256": "c" * 64,
            "tokenizer_sha256": "t" * 64,
            "weights_sha256": "w" * 64,
            "lora_targets": {"all-linear": TARGETS, "attention": TARGETS[:4]},
            "eos_token_ids": [],
        }
        (directory / "manifest.json").write_text(json.dumps(manifest))
        return store.publish_directory("base_model", directory)


def small_dataset(
    store: ArtifactStore, rows: int = 40, target: str | None = None, told: int = 0
) -> ArtifactRef:
    """A dataset artifact as `ml_assets.datasets` publishes it; the last `told` rows came from feedback."""
    places = ["kitchen", "bedroom", "hall", "cellar", "garden"]
    table = [
        {
            "said": f"turn {'on' if i % 2 else 'off'} light {i} in the {places[i % 5]}",
            "meant": target or json.dumps({"on": bool(i % 2), "area": places[i % 5]}),
            "_row": sha256_bytes(str(i).encode()),
            "_split": "train" if i % 5 else "evaluation",
            **({"_origin": "feedback" if i >= rows - told else "source", "_said": str(i)} if told else {}),
        }
        for i in range(rows)
    ]
    table.sort(key=lambda row: row["_row"])
    with store.staging("dataset") as directory:
        pq.write_table(pa.Table.from_pylist(table), directory / "rows.parquet")
        counts = {side: sum(row["_split"] == side for row in table) for side in ("train", "evaluation")}
        feedback = {"feedback": {"given": told}} if told else {}
        (directory / "manifest.json").write_text(json.dumps({"rows": counts} | feedback))
        return store.publish_directory("dataset", directory)


def small_inputs(store: ArtifactStore, **adapter) -> AdapterInputs:
    return open_inputs(small_spec(**adapter), store, small_base(store), small_dataset(store))


def train(home: Path, checkpoint_seconds: float = 0.0, on_progress=None) -> TrainedAdapter:
    store = ArtifactStore(str(home / "artifacts"))
    inputs = small_inputs(store)
    return train_adapter(inputs, store, home, checkpoint_seconds=checkpoint_seconds, on_progress=on_progress)


if __name__ == "__main__":
    trained = train(Path(sys.argv[1]), float(sys.argv[2]), lambda p: print("step", p.step, flush=True))
    print("resumed", trained.record["resumed_from"], trained.ref.digest, flush=True)
