"""Markdown that cannot be broken from inside: how text from strangers gets into a card.

A card prints tensor names, file names, licence strings and what a model answered. All of that is hostile text: a name
may hold `|` and end a table row, an answer may hold a fence and then a link, a licence may hold `<script>`. So in this
room a string is escaped unless it says otherwise:

    str         -> escaped when a template prints it (`finish`, installed as jinja2's finalize)
    Markdown    -> printed as it is; only the functions below make one, and each escapes what it is given
    None        -> "not measured"

HTML autoescape, jinja2's own answer, is the wrong one here: it leaves `|`, `*`, backticks and line breaks alone and would
spoil fenced blocks, where entities are not decoded. The catch of the type: joining Markdown gives a plain str, which is
escaped again. That errs on the ugly side, never on the dangerous one.

Rules used are CommonMark's (https://spec.commonmark.org/0.31.2) and GFM's tables: a backslash escapes punctuation; an
entity never opens or closes anything; a fence ends only at a line of at least as many of the same character.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

#: printed where a record has no figure
ABSENT = "not measured"
_PUNCTUATION = re.compile(r"([\\`*\[\]#|~$!])")
_EDGE_UNDERSCORE = re.compile(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
#: what would begin a list, a quotation or a heading, if it stood at the start of a line
_LINE_START = re.compile(r"^(?:[-+](?=\s|$)|-(?=-)|[=>]|\d+[.)](?=\s|$))")
_PLAIN_CODE = re.compile(r"[A-Za-z0-9_./:@+=, \[\]{}()'\"-]*[A-Za-z0-9_./:@+=,\[\]{}()'\"-]")


class Markdown(str):
    """Text that is Markdown already and will be printed as it is."""

    __slots__ = ()


def visible(text: str) -> str:
    """`text` with control, direction-changing and never-assigned characters spelled out as [U+XXXX]; tab and newline stay.

    They print nothing or reorder what is printed, so a reader would not see what a name or an answer really says.
    """
    return "".join(f"[U+{ord(c):04X}]" if _hidden(c) else c for c in text.replace("\r\n", "\n"))


def _hidden(character: str) -> bool:
    if character in "\n\t":
        return False
    bidirectional = (
        "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069" or character in "\u200e\u200f"
    )
    # no character by definition; a parser reads its entity as U+FFFD
    never = "\ufdd0" <= character <= "\ufdef" or ord(character) & 0xFFFE == 0xFFFE
    return bidirectional or never or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def text(value: Any) -> Markdown:
    """`value` as one line of running text or one table cell; nothing in it is markup."""
    line = " ".join(visible(str(value)).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;")
    line = _PUNCTUATION.sub(r"\\\1", line)
    line = _EDGE_UNDERSCORE.sub(r"\_", line)
    line = _LINE_START.sub(lambda m: m[0][:-1] + "\\" + m[0][-1], line)
    # a bare address would be turned into a link by GitHub and the hub
    return Markdown(line.replace("://", "&#58;//").replace("www.", "www&#46;"))


def code(value: Any) -> Markdown:
    """`value` as inline code, safe in a table cell too.

    Backticks for plain names; anything else as <code> with every special character an entity (a backtick span knows no
    escapes, and in a table GFM cuts cells before it looks for code).
    """
    line = " ".join(visible(str(value)).split())
    if _PLAIN_CODE.fullmatch(line):
        return Markdown(f"`{line}`")
    return Markdown("<code>" + "".join(c if c.isalnum() or c in " ./-" else f"&#{ord(c)};" for c in line) + "</code>")


def fence(value: Any, language: str = "text") -> Markdown:
    """`value` verbatim in a fenced block that no line of it can close."""
    body = visible(str(value))
    longest = max((len(run) for run in re.findall(r"`+", body)), default=0)
    marks = "`" * max(3, longest + 1)
    return Markdown(f"{marks}{language}\n{body}{'' if body.endswith(chr(10)) else chr(10)}{marks}")


def finish(value: Any) -> Any:
    """What jinja2 does with every printed expression: escape it, unless it is Markdown."""
    if value is None:
        return ABSENT
    return value if isinstance(value, Markdown) else text(value)


def joined(parts: Iterable[Any], separator: str = ", ") -> Markdown:
    """Parts, each escaped unless it is Markdown, with our own separator between them."""
    return Markdown(separator.join(finish(part) for part in parts))


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Markdown:
    """A GFM table; a heading that ends in `:` is aligned right. Cells are escaped unless they are Markdown."""
    lines = ["| " + " | ".join(title.removesuffix(":") for title in head) + " |"]
    lines.append("|" + "|".join("---:" if title.endswith(":") else "---" for title in head) + "|")
    lines += ["| " + " | ".join(finish(cell) for cell in row) + " |" for row in rows]
    return Markdown("\n".join(lines))


def count(value: Any) -> str | None:
    """An integer with thousands separators; None if it is not a number."""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else None


def gigabytes(value: Any) -> str | None:
    """Bytes as `19.08 GB (17.77 GiB)`; small ones as MB and MiB, or as they are. None if it is not a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if value < 10**5:
        return f"{value:,} bytes"
    if value < 10**8:
        return f"{value / 1e6:.2f} MB ({value / 2**20:.2f} MiB)"
    return f"{value / 1e9:.2f} GB ({value / 2**30:.2f} GiB)"


def decimal(value: Any, places: int = 2) -> str | None:
    """A number with a fixed count of decimals; None if it is not a number."""
    return f"{value:,.{places}f}" if isinstance(value, (int, float)) and not isinstance(value, bool) else None
