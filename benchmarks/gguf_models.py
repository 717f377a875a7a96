"""Tiny random models of every kind that is written to GGUF, and tokenizers of every kind of words."""

from typing import Any

import torch
import transformers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from shrew.packers.gguf.tokens import DIGIT, GPT2, SPACE

SIZES: dict[str, Any] = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
                         "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 256,
                         "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
                         "initializer_range": 0.1}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 5000.0}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2, "mamba_d_state": 16,
                         "mamba_n_groups": 2, "mamba_d_conv": 4}  # fmt: skip
GRANITE: dict[str, Any] = MAMBA | {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 96,
                                   "embedding_multiplier": 3.0, "residual_multiplier": 0.7}  # fmt: skip
MAMBA2: dict[str, Any] = {"num_heads": 8, "head_dim": 16, "expand": 2, "state_size": 16, "n_groups": 2}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"rope_parameters": PLAIN, "tie_word_embeddings": True}),
    "llama-wide": ("LlamaConfig", {"rope_parameters": PLAIN, "head_dim": 32, "attention_bias": True, "mlp_bias": True}),
    "llama-yarn": ("LlamaConfig", {"rope_parameters": YARN}),
    "llama-3": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "llama-linear": ("LlamaConfig", {"rope_parameters": {**PLAIN, "rope_type": "linear", "factor": 2.0}}),
    "mistral": ("MistralConfig", {"rope_parameters": PLAIN, "sliding_window": None}),
    "mixtral": ("MixtralConfig", {"rope_parameters": PLAIN, "num_local_experts": 4, "num_experts_per_tok": 2,
                                  "sliding_window": None}),
    "qwen2": ("Qwen2Config", {"rope_parameters": PLAIN}),
    "qwen3": ("Qwen3Config", {"rope_parameters": PLAIN, "head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-yarn": ("Qwen3Config", {"rope_parameters": YARN, "head_dim": 16}),
    "qwen3-moe": ("Qwen3MoeConfig", {"rope_parameters": PLAIN, "head_dim": 16, **MOE}),
    "qwen3-next": ("Qwen3NextConfig", {
        "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}, "head_dim": 32, **MOE,
        "shared_expert_intermediate_size": 64, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 32, "linear_value_head_dim": 32,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"]}),
    "gemma3": ("Gemma3TextConfig", {
        "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "final_logit_softcapping": 30.0,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {"full_attention": {**PLAIN, "rope_type": "linear", "factor": 2.0},
                            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}}),
    "lfm2": ("Lfm2Config", {"rope_parameters": PLAIN, "layer_types": ["conv", "full_attention", "conv"],
                            "block_multiple_of": 16}),
    "olmoe": ("OlmoeConfig", {"rope_parameters": PLAIN, "num_experts": 4, "num_experts_per_tok": 2,
                              "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "mamba2": ("Mamba2Config", MAMBA2 | {"tie_word_embeddings": True}),
    "mamba2-no-bias": ("Mamba2Config", MAMBA2 | {"n_groups": 1, "use_conv_bias": False, "tie_word_embeddings": False}),
    "granite-hybrid": ("GraniteMoeHybridConfig", GRANITE | {
        "layer_types": ["mamba", "attention", "mamba"], "position_embedding_type": None, "attention_multiplier": 0.2,
        "logits_scaling": 2.0}),
    "granite": ("GraniteMoeHybridConfig", GRANITE | {
        "layer_types": ["attention"] * 3, "position_embedding_type": "rope", "rope_parameters": PLAIN,
        "attention_multiplier": 0.25, "logits_scaling": 4.0}),
}  # fmt: skip


def tiny(kind: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **more: Any) -> Any:
    """A random model of a kind of CONFIGS whose weights `dtype` holds; norms, biases and decays off their start."""
    name, own = CONFIGS[kind]
    common = {key: value for key, value in SIZES.items() if name != "Mamba2Config" or "heads" not in key}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**common | own | more), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or parameter.shape[1] == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            parameter.copy_(parameter.to(dtype).float())
    return model.eval()


def byte_level(rules: tuple[str, ...], text: str, size: int = 300, ignore_merges: bool = False) -> Any:
    """A byte-level BPE that cuts text by `rules`, trained on a text, with special tokens, one of them in use."""
    steps: list[Any] = [
        pre_tokenizers.Digits(individual_digits=True) if rule == DIGIT
        else pre_tokenizers.Split(pattern=Regex(rule), behavior="isolated")
        for rule in rules if rule != GPT2
    ]  # fmt: skip
    core = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=GPT2 in rules)
    core.pre_tokenizer = pre_tokenizers.Sequence([*steps, level]) if steps else level
    core.decoder = decoders.ByteLevel()
    marks = ["<bos>", "<eos>", "<pad>"]
    core.train_from_iterator(text.splitlines(keepends=True), trainers.BpeTrainer(
        vocab_size=size - 1, special_tokens=marks, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))  # fmt: skip
    core.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def sentencepiece(text: str, size: int = 400, prefix: bool = True) -> Any:
    """A BPE of SentencePiece's kind: bytes, characters, pieces by their counts; every way to join two is a merge."""
    marks = ["<unk>", "<s>", "</s>"]
    pieces = marks + [f"<0x{byte:02X}>" for byte in range(256)]
    words = [SPACE + word for word in text.split()]
    pieces += sorted({letter for word in words for letter in word})
    counts: dict[str, int] = {}
    for word in words:
        for start in range(len(word)):
            for end in range(start + 2, min(len(word), start + 6) + 1):
                counts[word[start:end]] = counts.get(word[start:end], 0) + (end - start)
    merged = sorted(counts, key=lambda piece: (-counts[piece], piece))[: size - len(pieces)]
    vocab = {piece: number for number, piece in enumerate([*pieces, *merged])}
    merges = [
        (left, piece[len(left):])
        for piece in merged
        for left in sorted((piece[:at] for at in range(1, len(piece)) if {piece[:at], piece[at:]} <= vocab.keys()),
                           key=lambda left: vocab[left])
    ]  # fmt: skip
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend(SPACE)] if prefix else []
    core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    core.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    core.add_special_tokens(marks)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
