"""The tiny Gemma 4's own tokenizer and chat template: Gemma 4's frame, none of Google's words.

Gemma's tokenizer is a BPE over text whose spaces became `▁`, with 256 byte tokens as fallback. So is this one, trained
on the paragraph below, or on whatever text it is given. No merge crosses a space, a line end or a digit, so every number
is spelled digit by digit. Layout of the ids, V being the vocabulary size:

    0 .. 106      special tokens at Gemma 4's ids, `<unusedN>` between them
    107 .. 362    bytes `<0x00>` .. `<0xFF>`
    363 ..        characters and merges learned from TEXT: the *words*
    ..  V-8       `<unusedN>`
    V-8 .. V-2    the image, audio and video tokens; V-1 is unused

Gemma's tokenizer adds no `<bos>`; the template writes it. So does ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from halfbyte.records import write_text_atomic

LOW = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<mask>": 4,
    "<|tool>": 46,
    "<tool|>": 47,
    "<|tool_call>": 48,
    "<tool_call|>": 49,
    "<|tool_response>": 50,
    "<tool_response|>": 51,
    '<|"|>': 52,
    "<|think|>": 98,
    "<|channel>": 100,
    "<channel|>": 101,
    "<|turn>": 105,
    "<turn|>": 106,
}
HIGH = ("<|image>", "<|audio>", "<|image|>", "<|audio|>", "<image|>", "<audio|>", "<|video|>")
FIRST_BYTE = 107
FIRST_WORD = FIRST_BYTE + 256

TEXT = """The three primary colors are red, yellow and blue. A painter mixes them to make every other color: red and
yellow give orange, yellow and blue give green, blue and red give purple. On a screen the primary colors are red, green
and blue, because a screen adds light and a painter takes light away. In this image there is a red square on a white
table beside an open window. What is in this image? A small house with a green door stands near the river.
Quantization stores a number with fewer bits. A model that was trained with sixteen bits for every weight can be stored
with four bits, and then it needs a quarter of the memory. The model answers almost as well as before, but not quite.
Training that is aware of quantization lets the model feel the rounding while it learns, so that the weights settle
where rounding hurts least. What does quantization-aware training do? It makes a small model that behaves like a large one.
Name three animals that live in the sea. A whale, a seal and an octopus live in the sea. How many days are in a week?
There are seven days in a week: Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday. Who wrote this story?
Nobody knows who wrote it, but people have told it for hundreds of years, and every time somebody tells it again the
story changes a little. First count to ten: one, two, three, four, five, six, seven, eight, nine, ten. 0 1 2 3 4 5 6 7 8
9. Please write a short answer, then explain it step by step. Yes, of course! Here is my answer (it is short): "no"."""

#: Gemma 4's turn frame: `<|turn>role\n ... <turn|>\n`, and an empty thought when thinking is off. Written for this project.
CHAT_TEMPLATE = """{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] | trim -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'text' -%}{{- part['text'] | trim -}}
            {%- elif part['type'] == 'image' -%}{{- '<|image|>' -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
    {%- if not enable_thinking | default(false) -%}{{- '<|channel>thought\\n<channel|>' -}}{%- endif -%}
{%- endif -%}
"""


def special_ids(vocab_size: int) -> dict[str, int]:
    """Every special token -> its id in a vocabulary of `vocab_size`."""
    return LOW | {token: vocab_size - 8 + i for i, token in enumerate(HIGH)}


def write_tokenizer(path: Path, vocab_size: int, text: str = TEXT) -> range:
    """Train the BPE on `text`, write tokenizer.json to `path`, return the ids of the words (characters and merges)."""
    characters, merges = _learn(vocab_size - FIRST_WORD - 8, text)
    special = special_ids(vocab_size)
    vocab = dict(special) | {f"<0x{byte:02X}>": FIRST_BYTE + byte for byte in range(256)}
    for word in characters + ["".join(pair) for pair in merges]:
        vocab.setdefault(word, FIRST_WORD + len(vocab) - len(special) - 256)
    words = range(FIRST_WORD, FIRST_WORD + len(vocab) - len(special) - 256)
    taken = set(vocab.values())
    free = (i for i in range(vocab_size) if i not in taken)
    vocab |= {f"<unused{n}>": i for n, i in enumerate(free)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    body = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": t, **flags} for t, i in sorted(special.items(), key=lambda x: x[1])],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": merges,
        },
    }
    write_text_atomic(path, json.dumps(body, ensure_ascii=False, indent=1) + "\n")
    return words


def _learn(room: int, text: str) -> tuple[list[str], list[list[str]]]:
    """Characters of `text` (the 200 most frequent) and at most `room` minus that many merges, in the order they were learned."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import Sequence, Split
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    # spaces lead a word, as in Gemma's vocabulary ("▁red"), so the training text is cut before each of them
    tokenizer.pre_tokenizer = Sequence([Split("▁", behavior="merged_with_next"), Split(Regex(r"[0-9\n]"), "isolated")])
    trainer = BpeTrainer(vocab_size=room, min_frequency=2, show_progress=False, limit_alphabet=200)
    tokenizer.train_from_iterator([line.replace(" ", "▁") for line in text.splitlines(keepends=True)], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [list(pair) for pair in model["merges"]]
    made = {"".join(pair) for pair in merges}
    return sorted({"\n", "▁", *"0123456789", *(t for t in model["vocab"] if t not in made)}), merges


def tokenizer_config() -> dict[str, Any]:
    """tokenizer_config.json with the names under which Gemma 4's processor looks up its tokens."""
    return {
        "audio_token": "<|audio|>",
        "backend": "tokenizers",
        "boa_token": "<|audio>",
        "boi_token": "<|image>",
        "bos_token": "<bos>",
        "eoa_token": "<audio|>",
        "eoc_token": "<channel|>",
        "eoi_token": "<image|>",
        "eos_token": "<eos>",
        "eot_token": "<turn|>",
        "extra_special_tokens": ["<|video|>"],
        "image_token": "<|image|>",
        "mask_token": "<mask>",
        "pad_token": "<pad>",
        "padding_side": "left",
        "processor_class": "Gemma4Processor",
        "soc_token": "<|channel>",
        "sot_token": "<|turn>",
        "think_token": "<|think|>",
        "tokenizer_class": "GemmaTokenizer",
        "unk_token": "<unk>",
    }
