"""Worker: llama.cpp in its own environment; nothing of this project is imported but the worker's loop."""

import os
from typing import Any

from benchmarks.worker import serve, timed

Answer = dict[str, Any]
_llama: Any = None
_stop: list[int] = []


def load(gguf: str, stop_ids: list[int]) -> Answer:
    """Load the quantised file."""
    global _llama, _stop
    from llama_cpp import Llama  # pyright: ignore[reportMissingImports]

    threads = int(os.environ["OMP_NUM_THREADS"])
    _llama = Llama(model_path=gguf, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
    _stop = stop_ids
    return {}


def generate(prompts: list[list[int]], new_tokens: int) -> Answer:
    """Greedy answers, one by one; the prefix shared with the prompt before is not computed again."""
    tokens: list[list[int]] = []
    answer: Answer = {}
    with timed(answer):
        for prompt in prompts:
            row: list[int] = []
            for token in _llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
                if token in _stop:
                    break
                row.append(int(token))
                if len(row) == new_tokens:
                    break
            tokens.append(row)
    return answer | {"tokens": tokens}


if __name__ == "__main__":
    serve({"load": load, "generate": generate})
