"""Worker: transformers' own ways to generate, and peft's way to mix adapters in a batch.

Runs in the project's environment; nothing of this project is imported but the worker's loop.
"""

from typing import Any

import torch

from benchmarks.worker import serve, timed

Answer = dict[str, Any]
_model: Any = None
_stop: list[int] = []
_pad = 0


def load(
    base: str, dtype: str, stop_ids: list[int], pad_id: int, adapters: dict[str, str] | None = None
) -> Answer:
    """Load the base, and PEFT folders by name on it."""
    global _model, _stop, _pad
    from transformers import AutoModelForCausalLM

    _stop, _pad = stop_ids, pad_id
    _model = AutoModelForCausalLM.from_pretrained(
        base, dtype=getattr(torch, dtype), local_files_only=True, use_safetensors=True
    ).eval()
    for name, folder in (adapters or {}).items():
        from peft import PeftModel

        if hasattr(_model, "peft_config"):
            _model.load_adapter(folder, adapter_name=name)
        else:
            _model = PeftModel.from_pretrained(_model, folder, adapter_name=name)
    _model.eval()
    return {}


@torch.inference_mode()
def generate(
    prompts: list[list[int]], new_tokens: int, rows: int = 1, adapters: list[str] | None = None
) -> Answer:
    """Greedy answers with `model.generate`, `rows` at a time: the longest first, padded on the left.

    `adapters` names that of each prompt: mixed in a batch by peft's `adapter_names`.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    tokens: list[list[int]] = [[] for _ in prompts]
    answer: Answer = {}
    with timed(answer):
        for at in range(0, len(order), rows):
            batch = order[at : at + rows]
            width = max(len(prompts[i]) for i in batch)
            ids = torch.tensor([[_pad] * (width - len(prompts[i])) + prompts[i] for i in batch])
            mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
            mixed = {"adapter_names": [adapters[i] for i in batch]} if adapters else {}
            out = _model.generate(input_ids=ids, attention_mask=mask, **_greedy(new_tokens), **mixed)[
                :, width:
            ]
            for i, row in zip(batch, out.tolist(), strict=True):
                tokens[i] = _until_stop(row)
    return answer | {"tokens": tokens}


def sequential(prompts: list[list[int]], new_tokens: int, rows: int, adapters: list[str]) -> Answer:
    """The prompts of one adapter after those of another (`set_adapter`)."""
    tokens: list[list[int]] = [[] for _ in prompts]
    seconds = 0.0
    for name in sorted(set(adapters)):
        mine = [i for i, adapter in enumerate(adapters) if adapter == name]
        _model.set_adapter(name)
        found = generate([prompts[i] for i in mine], new_tokens, rows)
        seconds += found["seconds"]
        for i, row in zip(mine, found["tokens"], strict=True):
            tokens[i] = row
    return {"seconds": seconds, "tokens": tokens}


def continuous(prompts: list[list[int]], new_tokens: int) -> Answer:
    """Continuous batching (`generate_batch`), its cache bounded to what these prompts need."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    page = 256
    pages = sum(-(-(len(prompt) + new_tokens) // page) for prompt in prompts) + 8
    bounds = ContinuousBatchingConfig(page_size=page, num_blocks=pages, max_batch_tokens=1024)
    config = GenerationConfig(**_greedy(new_tokens))
    answer: Answer = {}
    with timed(answer):
        out = _model.generate_batch(
            prompts, generation_config=config, continuous_batching_config=bounds, progress_bar=False
        )
    by_prompt = {tuple(found.prompt_ids): found.generated_tokens for found in out.values()}
    return answer | {"tokens": [_until_stop(by_prompt[tuple(prompt)]) for prompt in prompts]}


def _greedy(new_tokens: int) -> Answer:
    return {
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "eos_token_id": _stop,
        "pad_token_id": _pad,
    }


def _until_stop(row: list[int]) -> list[int]:
    ends = [i for i, token in enumerate(row) if token in _stop]
    return row[: ends[0]] if ends else row


if __name__ == "__main__":
    from transformers.utils import logging

    logging.set_verbosity_error()
    serve({"load": load, "generate": generate, "sequential": sequential, "continuous": continuous})
