"""Small random base models in the Hugging Face layout, made on the spot: the real code paths, in a second."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from ml_assets.base_models.conversion import quiet

ARCHITECTURES = ("llama", "qwen2", "mistral", "gpt2", "gpt_neox", "gemma")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 400
CONTEXT = 512
_CORPUS = [
    "turn on the light in the kitchen",
    "turn off the lamp in the bedroom and close the window",
    "what is the temperature in the living room?",
    '{"intent": "HassTurnOn", "area": "kitchen", "name": "ceiling light"}',
    '{"intent": "HassGetState", "area": "bedroom", "brightness": 50}',
    "the shares of the company rose on monday after the market opened",
    "the minister said the vote would be held next week",
    "system user assistant: classify the topic of the text. business sport politics",
] * 4


def tiny_model(architecture: str, directory: Path, chat_template: bool = True, seed: int = 0) -> Path:
    """Write a random causal model (2 layers, hidden size 64, context 512, bfloat16) with a byte-level BPE
    tokenizer of at most 400 tokens to `directory`, and return it.

    `architecture` is one of ARCHITECTURES. EOS is `<|im_end|>`; with `chat_template`, a ChatML template.
    Same arguments, same bytes.
    """
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        model_max_length=CONTEXT,
    )
    if chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(_config(architecture, tokenizer), dtype=torch.bfloat16)
    finally:
        torch.set_rng_state(state)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with quiet():
        model.save_pretrained(directory)
    return directory


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def _config(architecture: str, tokenizer: Any) -> Any:
    from transformers import (
        GemmaConfig,
        GPT2Config,
        GPTNeoXConfig,
        LlamaConfig,
        MistralConfig,
        Qwen2Config,
    )

    special = {
        "vocab_size": VOCABULARY,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    shape = special | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
    }
    grouped = shape | {"num_key_value_heads": 2}
    match architecture:
        case "llama":
            return LlamaConfig(**grouped, tie_word_embeddings=True)
        case "qwen2":
            return Qwen2Config(**grouped, tie_word_embeddings=False)
        case "mistral":
            return MistralConfig(**grouped, sliding_window=None)
        case "gemma":
            return GemmaConfig(**grouped, head_dim=16)
        case "gpt_neox":
            return GPTNeoXConfig(**shape)
        case "gpt2":
            return GPT2Config(**special, n_embd=64, n_layer=2, n_head=4, n_positions=CONTEXT)
    raise ValueError(f"architecture {architecture!r}: expected one of {', '.join(ARCHITECTURES)}")
