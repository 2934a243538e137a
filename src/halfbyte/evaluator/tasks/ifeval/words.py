"""Pieces of an answer: words, sentences, parts between marks.

A sentence ends with . ! ? or their relatives, closing quotes included, where white space and something that can begin a
sentence follow; not after common abbreviations, single letters or numbers of a list. nltk's trained splitter, which the original
uses, knows more abbreviations; the two agree on plain prose.
"""

from __future__ import annotations

import re

ABBREVIATIONS = frozenset({
    "mr", "mrs", "ms", "dr", "prof", "sr", "jr", "st", "vs", "etc", "e.g", "i.e", "cf", "approx", "dept", "est", "fig", "inc", "ltd",
    "co", "no", "vol", "rev", "gen", "col", "capt", "sgt", "a.m", "p.m", "u.s", "u.k",
})  # fmt: skip
_END = re.compile(r"""(?<=[.!?。！？।॥؟…])(["'”’)\]*_]*)\s+""")
_LIST_MARK = re.compile(r"(?:[-*•#]+|\(?(?:\d{1,3}|[A-Za-z])[.)])")
_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores: "don't" is two, as the paper counts."""
    return _WORD.findall(text)


def sentences(text: str) -> list[str]:
    """The sentences of a text; a line without an end mark goes on in the next, as in prose."""
    found: list[str] = []
    begin = 0
    for end in _END.finditer(text):
        piece = text[begin : end.end(1)].strip()
        last = piece.rpartition(" ")[2].rpartition("\n")[2].lstrip("(\"'“‘*_")
        following = text[end.end() : end.end() + 1]
        if _goes_on(last, following):
            continue
        if piece:
            found.append(piece)
        begin = end.end()
    if re.search(r"\w", rest := text[begin:]):
        found.append(rest.strip())
    return found


def _goes_on(last: str, following: str) -> bool:
    """Whether a full stop after `last` ends no sentence."""
    if not last.endswith("."):
        return following.islower() and not last.endswith(("!", "?"))
    bare = last[:-1].lower()
    return bare in ABBREVIATIONS or _LIST_MARK.fullmatch(last) is not None or following.islower()


def parts(text: str, mark: str) -> list[str] | None:
    """What stands between marks (a regular expression), stripped; an empty first or last part does not count.

    returns  None if a part in the middle is empty
    """
    found = [part.strip() for part in re.split(mark, text)]
    if found and not found[0]:
        found = found[1:]
    if found and not found[-1]:
        found = found[:-1]
    return found if all(found) else None
