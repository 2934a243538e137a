"""Last words to be guessed, cut from WikiText-2 by rule: the file for `halfbyte evaluate --task lastword=FILE`.

LAMBADA's passages are not ours to ship, and its idea needs no hand: a sentence's last word, with what comes before it. The rule,
without a draw, so that everybody who has wiki.test.raw gets the same bytes:

    articles, detokenized as everywhere (texts.reading); their lines are paragraphs, headings left out
    a sentence ends in . ! or ? before white space and a capital, a digit or an opening mark, and with its paragraph
    an item is a sentence whose last word has at least 4 letters, and nothing but letters, with a full stop behind it
    its text is that sentence up to the word (without the full stop) and as many whole sentences before it in the paragraph as
        give at least 40 words before the word; more than 64 are too many: the sentence is left out
    no sentence is in two items: an item begins behind the one before it
    kind `said before` if the word stands in that text before (case apart), as LAMBADA's mostly do; else `new`

Each line also carries its whole paragraph as `source`, which no model sees: by it `halfbyte evaluate` knows text that a candidate was
calibrated on. The catch: items of one paragraph share no word of text but their topic, so they are less than independent; names say article,
paragraph and sentence (`3.14.2`) for whoever wants to resample by them. Most words are `new`, and nobody can guess many of those.

    python benchmarks/evaluation/last_words.py wiki.test.raw last_words.jsonl
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halfbyte.errors import run_script
from halfbyte.texts.reading import wikitext_articles

LEAST_LETTERS, LEAST_WORDS, MOST_WORDS = 4, 40, 64
SENTENCE_END = re.compile(r"""(?<=[.!?])\s+(?=[A-Z0-9"'(\[])""")
LAST_WORD = re.compile(rf"\s([A-Za-z]{{{LEAST_LETTERS},}})\.$")


def items_of(raw: str) -> Iterator[dict[str, Any]]:
    """The lines of the file, in the order of the text."""
    for article, document in enumerate(wikitext_articles(raw), start=1):
        lines = [line.strip() for line in document.text.split("\n") if line.strip()]
        for paragraph, line in enumerate((each for each in lines if not each.startswith("=")), start=1):
            sentences = SENTENCE_END.split(line)
            used = 0
            for place in range(1, len(sentences) + 1):
                item = _item(sentences[used:place])
                if item is not None:
                    used = place
                    yield {"id": f"{article}.{paragraph}.{place}", **item, "source": line}


def _item(sentences: list[str]) -> dict[str, Any] | None:
    """Of the last of these sentences of a paragraph; None if it makes none."""
    found = LAST_WORD.search(sentences[-1])
    if found is None:
        return None
    for first in range(len(sentences) - 1, -1, -1):
        before = " ".join(sentences[first:])[: -len(found[1]) - 1].split()
        if len(before) >= LEAST_WORDS:
            said = {word.strip(".,;:!?\"'()[]").lower() for word in before}
            kind = "said before" if found[1].lower() in said else "new"
            text = " ".join([*before, found[1]])
            return {"kind": kind, "text": text, "target": found[1]} if len(before) <= MOST_WORDS else None
    return None


def write_last_words(text: Path, out: Path) -> int:
    """Write the file; returns the number of items."""
    items = list(items_of(text.read_text(encoding="utf-8")))
    out.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
    return len(items)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="wiki.test.raw")
    parser.add_argument("out", type=Path, help="JSON lines")
    given = parser.parse_args()
    print(f"{write_last_words(given.text, given.out):,} items in {given.out}")


if __name__ == "__main__":
    run_script(main)
