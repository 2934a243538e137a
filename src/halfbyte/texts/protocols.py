"""Named, versioned protocols: from texts and a tokenizer to rows. A figure is worth as much as the name in its brackets.

    kld[assistant,on-policy]  answers the bf16 reference wrote itself (greedy), in the chat frame; the answer counts
    kld[assistant,given]      given answers in the chat frame; the answer and the end of the turn count
    ppl[assistant-frame]      text inside an assistant turn that never ends; the text counts
    ppl[raw]                  text alone, one <bos> a window if the tokenizer has one; for base models
    ppl[raw,wikitext-80]      80 paragraphs of WikiText-2 test: the protocol of a published table, to re-run it as it stands
    kld[assistant,on-policy,image]  the same as the first, about a picture (halfbyte.texts.vision.rows)

Why the frame matters: an instruct model prices text outside its own turn as noise. Gemma 4's perplexity on bare WikiText is in the thousands, in the
assistant's turn 37: the raw figure measures how surprised the model is to be out of its frame, and moves by that.
Raw rows of a model with a chat template are therefore marked `out_of_frame` in their facts, and must be printed so.

How rows are cut, always on token ids and never on strings: the prompt is what the template renders up to the generation
prompt; the answer is encoded by itself and appended, as generation would have appended it; nothing but the protocol puts in
a <bos>, and `check_bos` counts.

A change of any rule here changes the version: figures of different versions are not comparable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from halfbyte.errors import SourceError, UsageError
from halfbyte.layers.rows import Rows
from halfbyte.layers.weights import Weights
from halfbyte.records import digest
from halfbyte.texts.reading import Chat, Document, words_and_bytes

if TYPE_CHECKING:
    import numpy as np

VERSIONS: Mapping[str, int] = {
    "kld[assistant,on-policy]": 1,
    "kld[assistant,given]": 1,
    "ppl[assistant-frame]": 1,
    "ppl[raw]": 1,
    "ppl[raw,wikitext-80]": 1,
    "kld[assistant,on-policy,image]": 1,
}
#: the one that is built elsewhere: halfbyte.texts.vision.rows
IMAGE = "kld[assistant,on-policy,image]"
#: what the user says before the text of `ppl[assistant-frame]`; templates want a user's turn first
FRAME_REQUEST = "Write a text."
#: the published table says "80 documents, about 30k tokens" and no more; long paragraphs, taken in order, give that
PARAGRAPHS, PARAGRAPH_WORDS = 80, 250
_MARK = "halfbyte-marks-the-answer"


def load_tokenizer(weights: Weights) -> Any:
    """The tokenizer of `weights`, from its own files; raises SourceError if there is none that transformers can read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            weights.companions_folder(), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(
            f"no tokenizer that transformers can read ({str(error).splitlines()[0][:200]})",
            where=weights.label,
            todo="put the tokenizer's files beside the weights",
        ) from None


def is_instruct(tokenizer: Any) -> bool:
    """Whether the model has a turn frame of its own: a chat template. Base models have none."""
    return bool(getattr(tokenizer, "chat_template", None))


def tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """What ties rows to a tokenizer: hashes of vocabulary and template, and whether there is a frame."""
    return {
        "vocabulary": digest(sorted(tokenizer.get_vocab().items())),
        "template": digest(tokenizer.chat_template) if is_instruct(tokenizer) else None,
        "instruct": is_instruct(tokenizer),
    }


def given_answers(tokenizer: Any, chats: Sequence[Chat], *, length: int = 2048) -> Rows:
    """`kld[assistant,given]`: every chat with its given response, cut at `length` tokens; chats without one are an error.

    Counts: every token of the response, then the token with which the template ends the turn.
    """
    _need_frame(tokenizer, "kld[assistant,given]")
    for chat in chats:
        if chat.response is None:
            raise SourceError("has no response", where=f"chat {chat.name}", todo="use kld[assistant,on-policy]")
    tokens: list[np.ndarray] = []
    scored: list[np.ndarray] = []
    for chat, answer in zip(chats, answer_ids(tokenizer, [chat.response for chat in chats], ()), strict=True):
        _add(tokens, scored, prompt_ids(tokenizer, chat.messages), answer, length)
    return _rows("kld[assistant,given]", tokenizer, tokens, scored, chats, {"length": length})


def on_policy_answers(
    tokenizer: Any, chats: Sequence[Chat], answers: Sequence[Sequence[int]], *, facts: Mapping[str, Any]
) -> Rows:
    """`kld[assistant,on-policy]`: chats with the token ids that the reference generated (`traces.write_answers`).

    facts  of the generation: who wrote, how long at most. Chats whose answer is empty are left out, and counted in the facts
    """
    _need_frame(tokenizer, "kld[assistant,on-policy]")
    pairs = [(chat, answer) for chat, answer in zip(chats, answers, strict=True) if len(answer)]
    tokens: list[np.ndarray] = []
    scored: list[np.ndarray] = []
    for chat, answer in pairs:
        prompt = prompt_ids(tokenizer, chat.messages)
        _add(tokens, scored, prompt, list(answer), len(prompt) + len(answer))
    about = {**facts, "empty_answers": len(chats) - len(pairs)}
    return _rows("kld[assistant,on-policy]", tokenizer, tokens, scored, [chat for chat, _ in pairs], about)


def assistant_frame(
    tokenizer: Any, documents: Sequence[Document], *, window: int = 512, windows: int | None = None
) -> Rows:
    """`ppl[assistant-frame]`: windows of `window` text tokens, each behind the same prompt; all text tokens count.

    windows  the first so many of each document; None: all
    """
    _need_frame(tokenizer, "ppl[assistant-frame]")
    prompt = prompt_ids(tokenizer, ({"role": "user", "content": FRAME_REQUEST},))
    facts = {"window": window, "windows": windows, "request": FRAME_REQUEST}
    return _windows("ppl[assistant-frame]", tokenizer, documents, prompt, facts)


def raw_text(
    tokenizer: Any,
    documents: Sequence[Document],
    *,
    window: int = 512,
    windows: int | None = None,
    bos: bool | None = None,
) -> Rows:
    """`ppl[raw]`: windows of `window` text tokens, with exactly one <bos> in front if the tokenizer has one.

    bos  None: as the tokenizer has one or not; False: never (what llama.cpp does for models trained without); the first
         token of a window has then no context and does not count
    windows  the first so many of each document; None: all
    """
    start = _bos(tokenizer, bos)
    facts = {"window": window, "windows": windows, "bos": bool(start), "out_of_frame": is_instruct(tokenizer)}
    return _windows("ppl[raw]", tokenizer, documents, start, facts)


def wikitext_80(tokenizer: Any, paragraphs: Sequence[Document], *, window: int = 1024) -> Rows:
    """`ppl[raw,wikitext-80]`: the first 80 paragraphs of 250 words or more, each one document in windows behind one <bos>.

    paragraphs  of WikiText-2's raw test split (`texts.wikitext_paragraphs`). A reconstruction: the published table states
                the count of documents and about 30k tokens, not how paragraphs were chosen
    """
    chosen = [paragraph for paragraph in paragraphs if paragraph.words >= PARAGRAPH_WORDS][:PARAGRAPHS]
    if len(chosen) < PARAGRAPHS:
        raise UsageError(
            f"{len(chosen)} paragraphs of {PARAGRAPH_WORDS} words or more",
            where="ppl[raw,wikitext-80]",
            todo="give --data wiki.test.raw (WikiText-2's test)",
        )
    start = _bos(tokenizer, None)
    facts = {"window": window, "bos": bool(start), "out_of_frame": is_instruct(tokenizer)}
    return _windows("ppl[raw,wikitext-80]", tokenizer, chosen, start, facts)


def prompt_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation up to where the assistant begins to write, by the model's own template."""
    found = tokenizer.apply_chat_template(
        [dict(message) for message in messages], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    ids: list[int] = found[0] if found and isinstance(found[0], list) else found
    check_bos(tokenizer, ids)
    return ids


def answer_ids(tokenizer: Any, given: Sequence[str | None], written: Sequence[Sequence[int]]) -> list[list[int]]:
    """Token ids of every answer: of a given one with the end of its turn, for None the next of those `written` by a model."""
    end = end_of_turn(tokenizer) if any(text is not None for text in given) else []
    own = iter(written)
    return [list(next(own)) if text is None else [*encode(tokenizer, text.strip()), *end] for text in given]


def end_of_turn(tokenizer: Any) -> list[int]:
    """The special token that the template writes right behind an answer, [] if it writes none."""
    messages = [{"role": "user", "content": FRAME_REQUEST}, {"role": "assistant", "content": _MARK}]
    tail = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(_MARK)[2]
    ids = encode(tokenizer, tail)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return ids[:1] if ids and ids[0] in special else []


def encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _bos(tokenizer: Any, wanted: bool | None) -> list[int]:
    if wanted and tokenizer.bos_token_id is None:
        raise UsageError("the tokenizer has no <bos>", where="bos", todo="leave the option out")
    return [tokenizer.bos_token_id] if wanted is not False and tokenizer.bos_token_id is not None else []


def check_bos(tokenizer: Any, ids: Sequence[int]) -> None:
    """Raises SourceError if a row begins with two <bos>: a template and a tokenizer that both add one."""
    bos = tokenizer.bos_token_id
    if bos is not None and list(ids[:2]) == [bos, bos]:
        raise SourceError("a row begins with two <bos>", where="chat template", todo="report the model")


def _need_frame(tokenizer: Any, protocol: str) -> None:
    if not is_instruct(tokenizer):
        raise UsageError("the model has no chat template (a base model)", where=protocol, todo="use ppl[raw]")


def _windows(
    protocol: str, tokenizer: Any, documents: Sequence[Document], prefix: list[int], facts: Mapping[str, Any]
) -> Rows:
    """Every document encoded once, cut into windows without overlap, each behind `prefix`; a lone last token is dropped."""
    if facts["window"] < 2:
        raise UsageError(f"a window of {facts['window']}", where="window", todo="use two tokens or more")
    tokens: list[np.ndarray] = []
    scored: list[np.ndarray] = []
    names = []
    for document in documents:
        ids = encode(tokenizer, document.text)
        for begin in range(0, len(ids), facts["window"])[: facts.get("windows")]:
            piece = ids[begin : begin + facts["window"]]
            if len(piece) < 2:
                continue
            _add(tokens, scored, prefix, piece, len(prefix) + len(piece))
            check_bos(tokenizer, tokens[-1].tolist())
            names.append(document.name)
    counts = {} if facts.get("windows") else words_and_bytes(documents)  # of whole documents, or of nothing
    made = _rows(protocol, tokenizer, tokens, scored, (), {**facts, **counts}, names)
    return replace(made, texts=None)


def _add(
    tokens: list[np.ndarray], scored: list[np.ndarray], context: Sequence[int], counted: Sequence[int], length: int
) -> None:
    """Append one row: predictions of `counted` count, as far as they fit into `length` tokens."""
    import numpy as np

    ids = np.array([*context, *counted][:length], np.int32)
    if len(ids) <= max(len(context), 1):
        raise SourceError(f"its prompt fills {length} tokens", where=f"row {len(tokens)}", todo="allow longer rows")
    mask = np.zeros(len(ids), bool)
    mask[max(len(context) - 1, 0) : -1] = True
    tokens.append(ids)
    scored.append(mask)


def _rows(
    protocol: str, tokenizer: Any, tokens: Sequence[np.ndarray], scored: Sequence[np.ndarray],
    chats: Sequence[Chat], facts: Mapping[str, Any], names: Sequence[str] | None = None,
) -> Rows:  # fmt: skip
    if not tokens:
        raise SourceError("nothing to score", where=protocol, todo="give longer texts")
    documents = names if names is not None else [chat.name for chat in chats]
    texts = [chat.messages[-1]["content"] for chat in chats]
    return Rows(protocol, VERSIONS[protocol], tokens, scored, documents, {**tokenizer_facts(tokenizer), **facts}, texts)
