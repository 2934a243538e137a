"""The last word of a text, guessed from what comes before it: LAMBADA's question (Paperno et al. 2016), on texts of one's own.

    {"text": "... He put the letter back into the box"}
    {"text": "...", "target": "the box", "id": "3.14.2", "kind": "said before", "source": "the paragraph it was cut from"}

Without `target` it is the last word: what stands behind the last white space. Right, as in lm-eval's lambada_openai: every token of it is the
greedy choice after the true tokens before it. Nothing is generated and nothing parsed (`evaluator.forcing`): one forward pass a text,
so a model that cannot do sums or follow instructions yet gives thousands of paired items in minutes.

Texts go in raw, for instruct models too, as LAMBADA's always do: a last word is no answer to a user's request. Accuracies of instruct models
are therefore those of a model out of its frame; here they only have to be out of it alike for both models.

`source` is a longer text that `text` was cut from. No model sees it; `evaluate` knows by it what a candidate was calibrated on.

The catch: which word is last is known to whoever cut the text, not to the model, and many last words nobody could guess. So an accuracy means
little by itself, and flips mean what they always do.
"""

from __future__ import annotations

from pathlib import Path

from halfbyte.evaluator.tasks.lines import Entry, about, read_lines, unique
from halfbyte.evaluator.tasks.task import Item, Task

VERSION = 1
RULE = "every token of the last word is the greedy choice after the true text before it"
#: characters of a text: about ten pages
LONGEST = 20_000


def read_lastword(path: Path) -> Task:
    """The task of a JSON-lines file; raises SourceError, naming the line."""
    entries = read_lines(path)
    items = [_item(number, entry) for number, entry in enumerate(entries, start=1)]
    unique(zip((item.id for item in items), entries, strict=True))
    return Task("lastword", VERSION, items, 0, RULE, [about(path)], grade, forced=True)


def grade(item: Item, answer: str) -> bool:
    """Whether what was said, token by token, is the item's last word (`evaluator.forcing` marks the same letters in other tokens)."""
    return bool(answer == item.key)


def _item(number: int, entry: Entry) -> Item:
    text = entry.text("text").rstrip()
    target = entry.text("target").strip() if "target" in entry.body else text.split()[-1]
    if len(text) > LONGEST:
        raise entry.wrong(f"a text of {len(text):,} characters", f"at most {LONGEST:,}: give its end")
    if not text.endswith(target):
        raise entry.wrong(f"its text does not end with its target {target[:80]!r}", "let the target be its last words")
    before = text[: -len(target)].rstrip()
    if not before:
        raise entry.wrong("nothing stands before its last word", "give a longer text")
    return Item(
        entry.name("id") if "id" in entry.body else str(number),
        entry.name("kind") if "kind" in entry.body else "last word",
        before, key=text[len(before) :], source=entry.text("source") if "source" in entry.body else None,
    )  # fmt: skip
