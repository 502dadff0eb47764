"""Worker: vLLM in its own environment; nothing of this project is imported but the worker's loop."""

from typing import Any

from benchmarks.worker import serve, timed

Answer = dict[str, Any]
_llm: Any = None
_stop: list[int] = []


def load(base: str, dtype: str, stop_ids: list[int], adapters: dict[str, str] | None = None) -> Answer:
    """Load the base; with `adapters` (folders by name), ready to mix them."""
    global _llm, _stop
    from vllm import LLM  # pyright: ignore[reportMissingImports]

    lora = {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": 16} if adapters else {}
    _llm = LLM(model=base, dtype=dtype, max_model_len=1024, max_num_seqs=64, **lora)
    _stop = stop_ids
    return {}


def generate(prompts: list[list[int]], new_tokens: int, adapters: list[list[str]] | None = None) -> Answer:
    """Greedy answers; `adapters` holds [name, folder] of each prompt. Shared prefixes are kept within a call,
    and forgotten before the next one."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    _llm.reset_prefix_cache()
    wanted = SamplingParams(temperature=0, max_tokens=new_tokens, stop_token_ids=_stop)
    mixed: Answer = {}
    if adapters:
        numbers = {name: i + 1 for i, name in enumerate(sorted({name for name, _ in adapters}))}
        mixed["lora_request"] = [LoRARequest(name, numbers[name], folder) for name, folder in adapters]
    answer: Answer = {}
    with timed(answer):
        out = _llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], wanted, use_tqdm=False, **mixed
        )
    rows = [list(found.outputs[0].token_ids) for found in out]
    return answer | {"tokens": [row[:-1] if row and row[-1] in _stop else row for row in rows]}


if __name__ == "__main__":
    serve({"load": load, "generate": generate})
