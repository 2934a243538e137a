"""What a model would say word for word where a text is laid before it: teacher-forced, one forward pass a text.

    tokens     The  river  was  deep  and  the  bo  at        of the whole text, as the tokenizer cuts it
    scored                                  1   1             the predictions of the target's tokens; all must be the greedy choice

Right is what lm-eval's lambada_openai calls right: with the true tokens before it, each token of the target is the likeliest one. A
model that generates greedily would then have written the target itself, so nothing has to be generated.

The target's tokens are those that the text's own encoding does not share with that of the text before the target, so a tokenizer that merges
across the cut is asked for the merged token. No chat template: this is text to go on with, not a question. A <bos> stands in front if the
tokenizer puts one there itself, or if the template does and writes it once in a whole conversation (Gemma). A token that opens every
turn (SmolLM2's <|im_start|>, which its files call <bos>) is a mark of turns, and no model was trained to find bare text behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from halfbyte.errors import SourceError
from halfbyte.evaluator.answers import Answer
from halfbyte.evaluator.scoring.choosing import greedy_choices
from halfbyte.layers.rows import Rows
from halfbyte.layers.weights import Weights
from halfbyte.texts.protocols import encode, is_instruct, prompt_ids, tokenizer_facts

if TYPE_CHECKING:
    import numpy as np

NAME, VERSION = "forced", 1
#: behind a text whose letters are the target's and whose tokens are not
OTHERWISE = " (in other tokens)"


@dataclass(frozen=True)
class Forced:
    """One text up to its target, and the target (with the white space before it); `id` is unique among those forced together."""

    id: str
    kind: str
    before: str
    target: str


def forced_rows(texts: Sequence[Forced], tokenizer: Any) -> Rows:
    """A row a text, every token of its target scored; raises SourceError, naming the text, if no token stands before it."""
    import numpy as np

    starts = _starts(tokenizer)
    tokens, scored = [], []
    for text in texts:
        whole, before = encode(tokenizer, text.before + text.target), encode(tokenizer, text.before)
        shared = next((at for at, (a, b) in enumerate(zip(whole, before, strict=False)) if a != b), min(len(whole), len(before)))  # fmt: skip
        context = len(starts) + shared
        if context == 0 or shared == len(whole):
            raise SourceError("no token before its last word, or none in it", where=text.id, todo="give a longer text")
        ids = np.array([*starts, *whole], np.int32)
        mask = np.zeros(len(ids), bool)
        mask[context - 1 : -1] = True
        tokens.append(ids)
        scored.append(mask)
    facts = {**tokenizer_facts(tokenizer), "bos": bool(starts)}
    return Rows(NAME, VERSION, tokens, scored, [text.id for text in texts], facts)


def force(
    weights: Weights, texts: Sequence[Forced], rows: Rows, tokenizer: Any, *, device: str, dtype: str, batch: int
) -> list[Answer]:
    """What the model says for each target, up to and with the first token that is another; in the order of `texts`.

    rows    of `forced_rows` on the same texts
    returns answers whose `tokens` are the greedy choices at the target's places; `correct` if they are the target's, all of them
    """
    chosen = greedy_choices(weights, rows, device=device, dtype=dtype, batch=batch)
    return [
        _answer(text, top, ids[1:][mask[:-1]], tokenizer)
        for text, top, ids, mask in zip(texts, chosen, rows.tokens, rows.scored, strict=True)
    ]


def _starts(tokenizer: Any) -> list[int]:
    """[<bos>] where bare text has one in front, else []."""
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer.encode("")[:1] == [bos]:
        return [] if bos is None else [bos]
    if not is_instruct(tokenizer):
        return []
    ids = prompt_ids(tokenizer, [{"role": role, "content": "a"} for role in ("user", "assistant", "user")])
    return [bos] if ids[0] == bos and ids.count(bos) == 1 else []


def _answer(text: Forced, top: np.ndarray, labels: np.ndarray, tokenizer: Any) -> Answer:
    right = bool((top == labels).all())
    if right:
        said = text.target
    else:
        said = tokenizer.decode(top[: int((top != labels).argmax()) + 1].tolist())
        said += OTHERWISE if said.strip() == text.target.strip() else ""
    return Answer(text.id, text.kind, said, right, tuple(top.tolist()))
