"""Worker: `transformers.Trainer` with peft, and TRL's `SFTTrainer`, on the same token ids.

Runs in the project's environment for the first and in that of TRL for the second: nothing of this project is
imported but the worker's loop.
"""

from typing import Any

import torch

from benchmarks.worker import serve, timed

Answer = dict[str, Any]


def train(
    library: str,
    base: str,
    examples: list[Answer],
    recipe: Answer,
    targets: list[str],
    output: str,
    dtype: str,
    pad_id: int,
    rows: int,
    batches: list[list[int]] | None = None,
    packing: bool = False,
    save: bool = True,
) -> Answer:
    """Train an adapter into the folder `output`; `seconds` of `trainer.train()` alone.

    `rows` is the number of examples of a step, drawn at random; `batches` gives those of each step instead.
    `packing` is TRL's, to sequences of the recipe's `batch_tokens`, one for each step. With bfloat16 as
    `dtype` the base stays in float32 and computes in bfloat16 where that is safe (autocast).
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(recipe["seed"])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    torch.manual_seed(recipe["seed"])
    config = LoraConfig(
        r=recipe["rank"],
        lora_alpha=recipe["alpha"],
        target_modules=targets,
        task_type="CAUSAL_LM",
        bias="none",
    )
    model = get_peft_model(model, config)
    common = {
        "output_dir": output,
        "per_device_train_batch_size": 1 if packing else rows,
        "num_train_epochs": recipe["epochs"],
        "learning_rate": recipe["learning_rate"],
        "lr_scheduler_type": recipe["schedule"],
        "warmup_steps": recipe["warmup"],  # a share, when below 1
        "weight_decay": recipe["weight_decay"],
        "max_grad_norm": recipe["max_grad_norm"],
        "seed": recipe["seed"],
        "bf16": dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    if library == "trl":
        trainer = _sft(model, base, examples, common, recipe["batch_tokens"], packing)
    else:
        trainer = _trainer(model, examples, common, pad_id, batches)
    answer: Answer = {}
    with timed(answer):
        result = trainer.train()
    if save:
        model.save_pretrained(output)
    return answer | {"steps": result.global_step, "loss": result.training_loss}


def _trainer(
    model: Any, examples: list[Answer], common: Answer, pad_id: int, batches: list[list[int]] | None
) -> Any:
    from transformers import Trainer, TrainingArguments

    data = [
        {
            "input_ids": one["prompt"] + one["target"],
            "labels": [-100] * len(one["prompt"]) + one["target"],
        }
        for one in examples
    ]

    def pad(found: list[Answer]) -> Answer:
        width = max(len(one["input_ids"]) for one in found)
        fill = {"input_ids": pad_id, "labels": -100, "attention_mask": 0}
        full = [one | {"attention_mask": [1] * len(one["input_ids"])} for one in found]
        return {
            key: torch.tensor([one[key] + [value] * (width - len(one[key])) for one in full])
            for key, value in fill.items()
        }

    class Planned(Trainer):
        """Takes the batches that it is given."""

        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(data, batch_sampler=batches, collate_fn=pad)  # type: ignore[arg-type]

    if batches is not None:
        common = common | {"max_steps": len(batches)}
    arguments = TrainingArguments(**common, remove_unused_columns=False)
    kind = Trainer if batches is None else Planned
    return kind(model=model, args=arguments, train_dataset=data, data_collator=pad)  # type: ignore[arg-type]


def _sft(model: Any, base: str, examples: list[Answer], common: Answer, length: int, packing: bool) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    data = Dataset.from_list(
        [
            {
                "input_ids": one["prompt"] + one["target"],
                "completion_mask": [0] * len(one["prompt"]) + [1] * len(one["target"]),
            }
            for one in examples
        ]
    )
    arguments = SFTConfig(
        **common,
        completion_only_loss=True,
        packing=packing,
        max_length=length,
        gradient_checkpointing=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    return SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)


if __name__ == "__main__":
    from transformers.utils import logging

    logging.set_verbosity_error()
    serve({"train": train})
