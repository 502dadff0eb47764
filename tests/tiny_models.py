"""Small random base models in the Hugging Face layout, made on the spot: the real code paths, in a second."""

from functools import lru_cache
from pathlib import Path
from typing import Any

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


def tiny_model(
    architecture: str,
    directory: Path,
    chat_template: bool = True,
    seed: int = 0,
    heads: int = 4,
    layers: int = 2,
    hidden: int = 64,
    vocabulary: int = 400,
) -> Path:
    """Write a random causal model (context 512, bfloat16) with a byte-level BPE tokenizer of at most
    `vocabulary` tokens (at least the 256 bytes and 3 more) to `directory`, and return it.

    `architecture` is one of ARCHITECTURES, or of the peculiar ones in `_config`. EOS is `<|im_end|>`; with
    `chat_template`, a ChatML template.
    `heads` divides the hidden size: some servers want heads of 32 or more. Same arguments, same bytes.
    """
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from ml_assets.engine.loading import quiet

    quiet()
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(vocabulary),
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
        model = AutoModelForCausalLM.from_config(
            _config(architecture, tokenizer, heads, layers, hidden), dtype=torch.bfloat16
        )
    finally:
        torch.set_rng_state(state)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(directory)
    return directory


def tiny_gguf(path: Path, seed: int = 0) -> Path:
    """Write the model of `tiny_model("llama", ..., seed=seed)` as a GGUF file (weights in float32), and
    return its path. Same arguments, same bytes."""
    import json
    from tempfile import TemporaryDirectory

    import gguf
    from safetensors.torch import load_file

    with TemporaryDirectory() as temporary:
        directory = tiny_model("llama", Path(temporary), seed=seed)
        config = json.loads((directory / "config.json").read_text())
        tokenizer = json.loads((directory / "tokenizer.json").read_text())["model"]
        tensors = load_file(directory / "model.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(path), "llama")
    heads, grouped = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(grouped)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    vocabulary = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    kinds = [gguf.TokenType.CONTROL if t in SPECIAL_TOKENS else gguf.TokenType.NORMAL for t in vocabulary]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_chat_template(CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in sorted(tensors.items()):
        data = tensor.float().numpy()
        rows = heads if "q_proj" in name else grouped if "k_proj" in name else 0
        if rows:  # GGUF keeps the two halves of a rotary head interleaved
            data = data.reshape(rows, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@lru_cache(maxsize=4)
def _tokenizer(vocabulary: int = VOCABULARY) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def _config(architecture: str, tokenizer: Any, heads: int, layers: int, hidden: int) -> Any:
    from transformers import (
        BambaConfig,
        BioGptConfig,
        FalconConfig,
        Gemma2Config,
        GemmaConfig,
        Glm4MoeConfig,
        GPT2Config,
        GPTNeoXConfig,
        Lfm2Config,
        LlamaConfig,
        MambaConfig,
        MistralConfig,
        Phi3Config,
        PhimoeConfig,
        Qwen2Config,
        RecurrentGemmaConfig,
        RwkvConfig,
    )

    special = {
        "vocab_size": VOCABULARY,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    shape = special | {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": CONTEXT,
    }
    grouped = shape | {"num_key_value_heads": heads // 2}
    match architecture:
        case "llama":
            return LlamaConfig(**grouped, tie_word_embeddings=True)
        case "qwen2":
            return Qwen2Config(**grouped, tie_word_embeddings=False)
        case "mistral":
            return MistralConfig(**grouped, sliding_window=None)
        case "gemma":
            return GemmaConfig(**grouped, head_dim=hidden // heads)
        case "gpt_neox":
            return GPTNeoXConfig(**shape)
        case "gpt2":
            return GPT2Config(**special, n_embd=hidden, n_layer=layers, n_head=heads, n_positions=CONTEXT)
        case "falcon":  # adds to the output of a linear layer in place
            return FalconConfig(**shape, parallel_attn=True)
        case "phimoe":  # tells its sliding window to the mask alone
            return PhimoeConfig(**grouped, num_local_experts=4, sliding_window=24)
        case "biogpt":  # drops out by a function, at a rate of its own name
            return BioGptConfig(**shape)
        case "gemma2":  # caps its attention scores
            return Gemma2Config(**grouped, head_dim=hidden // heads)
        case "phi3":  # has other positions beyond a length
            factors = [1.0] * (hidden // heads // 2)
            rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
            rope |= {"short_factor": factors, "long_factor": [8 * factor for factor in factors]}
            return Phi3Config(**grouped, rope_parameters=rope, original_max_position_embeddings=64)
        case "glm4_moe":  # has layers of experts, and before them plain ones
            experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
            groups = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
            return Glm4MoeConfig(**grouped, **experts, **groups, head_dim=hidden // heads)
        case "lfm2":  # has convolutions between its attention
            return Lfm2Config(**grouped, layer_types=["conv", "full_attention"] * (layers // 2))
        case "bamba":  # a state space between its attention
            space = {"mamba_n_heads": 8, "mamba_d_state": 8, "mamba_d_head": hidden // 4}
            space |= {"mamba_n_groups": 1, "mamba_chunk_size": 8}
            return BambaConfig(**grouped, attn_layer_indices=[1], **space)
        case "mamba":  # a state space alone, in a cache of another name
            return MambaConfig(**special, hidden_size=hidden, num_hidden_layers=layers, state_size=8)
        case "recurrent_gemma":  # keeps its state in its layers
            blocks = {"block_types": ["recurrent", "attention"], "lru_width": hidden}
            return RecurrentGemmaConfig(**grouped, **blocks, attention_window_size=CONTEXT)
        case "rwkv":  # gives its state as a list
            return RwkvConfig(
                **special,
                hidden_size=hidden,
                attention_hidden_size=hidden,
                num_hidden_layers=layers,
                context_length=CONTEXT,
            )
    raise ValueError(f"architecture {architecture!r}: expected one of {', '.join(ARCHITECTURES)}")
