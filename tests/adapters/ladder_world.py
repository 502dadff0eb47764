"""A customization, a champion on a tiny base, and other bases to carry it to; run as a program, it climbs.

`python ladder_world.py HOME BASE` prints a line for every rung and every step, then the climb as JSON.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from tiny_models import tiny_model

from ml_assets.adapters.ladder import Climbed, climb
from ml_assets.adapters.train import TrainedAdapter, open_inputs, train_adapter
from ml_assets.artifacts import ArtifactRef, ArtifactStore, sha256_bytes
from ml_assets.base_models.probe import lora_targets
from ml_assets.datasets.snapshot import Snapshot, write_snapshot
from ml_assets.eval_reports.build import Champion
from ml_assets.spec import CustomizationSpec

DEVICES = ["light", "lamp", "window", "door", "radio", "oven", "fan", "heater"]
ROOMS = ["kitchen", "bedroom", "living room", "hall", "office", "attic", "cellar", "garden"]
RECIPE = {
    "rank": 8,
    "alpha": 32.0,
    "steps": 60,
    "batch_tokens": 512,
    "learning_rate": 0.004,  # at 0.01 it depends on rounding whether the champion learns anything
    "targets": "all-linear",
}


def specification(
    rungs: list[str] | None = None, recipe: dict[str, Any] | None = None, **evaluation: Any
) -> CustomizationSpec:
    migration = {"rungs": rungs} if rungs else {}
    return CustomizationSpec.model_validate(
        {
            "name": "switches",
            "source": {"kind": "jsonl", "path": "rows.jsonl"},
            "prompt": {"user": "{text}", "target": "{label}"},
            "base_models": ["tiny"],
            "adapter": RECIPE | (recipe or {}),
            "migration": {"tune_share": 0.2, **migration},
            "evaluation": {
                "task": "classification",
                "segments": ["label"],
                "few_shot": 2,
                "gate": {"margin": 0.15, "max_forgetting": 50, "max_negative_flips": 0.3},
                **evaluation,
            },
        }
    )


class World:
    """A store with bases by name, a dataset and a champion."""

    def __init__(self, home: Path):
        self.home = home
        self.store = ArtifactStore(str(home / "artifacts"))
        self.dataset = self._dataset()

    def base(self, name: str) -> ArtifactRef:
        """`old`; `minor`: a little noise on its weights; `shallow`: a layer removed; `wide`: other sizes;
        `foreign`: another architecture and tokenizer; `unlike`: same shapes, other weights; `padded`:
        `minor`, with a tokenizer that was saved after it had padded and cut texts."""
        with self.store.staging("base_model") as directory:
            model = self._model(name, directory)
            identity = sha256_bytes(f"tiny {name}".encode())
            manifest = {
                "family": "tiny",
                "revision": f"tiny@{identity[:12]}",
                "identity": identity,
                "architecture": type(model).__name__,
                "context_length": 512,
                "chat_template": "model",
                "chat_template_sha256": "c" * 64,
                "tokenizer_sha256": {"foreign": "f", "padded": "p"}.get(name, "t") * 64,
                "weights_sha256": sha256_bytes(name.encode()),
                "lora_targets": lora_targets(model),
                "eos_token_ids": [],
            }
            (directory / "manifest.json").write_text(json.dumps(manifest))
            return self.store.publish_directory("base_model", directory)

    @staticmethod
    def _model(name: str, directory: Path) -> Any:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        shape: dict[str, Any] = {"wide": {"hidden": 96, "layers": 4}, "foreign": {"vocabulary": 300}}.get(
            name, {}
        )
        shape = {"layers": 3} | shape
        seed = 1 if name in ("wide", "unlike", "foreign") else 0
        tiny_model("gpt2" if name == "foreign" else "llama", directory, seed=seed, **shape)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
        if name in ("minor", "padded"):
            generator = torch.Generator().manual_seed(5)
            for weight in model.parameters():
                noise = torch.randn(weight.shape, generator=generator).to(weight)
                weight.data += 0.01 * weight.std() * noise
            model.save_pretrained(directory)
        if name == "padded":
            tokenizer = AutoTokenizer.from_pretrained(directory)
            tokenizer(["a", "a b"], padding=True, truncation=True, max_length=2)
            tokenizer.padding_side, tokenizer.pad_token = "left", "<|im_start|>"
            tokenizer.model_max_length = 64
            tokenizer.save_pretrained(directory)
        if name == "shallow":
            del model.model.layers[1]
            model.config.num_hidden_layers = 2
            model.config.layer_types = None
            for i, layer in enumerate(model.model.layers):
                layer.self_attn.layer_idx = i
            model.save_pretrained(directory)
        return model

    def _dataset(self) -> ArtifactRef:
        rows = []
        for device in DEVICES:
            for room in ROOMS:
                for verb in ("on", "off"):
                    text = f"turn {verb} the {device} in the {room}"
                    rows.append({"text": text, "label": verb, "_row": sha256_bytes(text.encode())})
        rows.sort(key=lambda row: row["_row"])
        train = [row | {"_split": "train"} for row in rows[::2]]
        evaluation = [row | {"_split": "evaluation"} for row in rows[1::2]]
        manifest = {"source_version": "v1", "rows": {"train": len(train), "evaluation": len(evaluation)}}
        with self.store.staging("dataset") as directory:
            write_snapshot(Snapshot(train, evaluation, ["text", "label"], {}, {}), directory, manifest)
            return self.store.publish_directory("dataset", directory)

    def champion(self, spec: CustomizationSpec | None = None, base: str = "old") -> TrainedAdapter:
        inputs = open_inputs(spec or specification(), self.store, self.base(base), self.dataset)
        return train_adapter(inputs, self.store, self.home)

    def climb(self, base: str, spec: CustomizationSpec | None = None, **options: Any) -> Climbed:
        spec = spec or specification()
        champion = Champion(self.champion(spec).ref, self.base("old"))
        return climb(
            spec,
            self.home,
            self.store,
            self.home,
            base_model=self.base(base),
            dataset=self.dataset,
            champion=champion,
            **options,
        )


if __name__ == "__main__":
    world = World(Path(sys.argv[1]))
    climbed = world.climb(
        sys.argv[2],
        tell=lambda line: print("rung", line, flush=True),
        on_progress=lambda progress: print("step", progress.step, flush=True),
        checkpoint_seconds=0.0,
    )
    print(json.dumps(dataclasses.asdict(climbed.climb)), flush=True)
