"""Text from strangers stays text: judged by a CommonMark parser, not by our own idea of one."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from halfbyte.cards.markdown import Markdown, code, fence, finish, gigabytes, joined, table, text, visible

HOSTILE = [
    "a | b", "`x`", "``` x", "*bold* _it_", "[l](javascript:alert(1))", "![i](x)", "<script>alert(1)</script>", "&lt;b&gt;",
    "# title", "- item", "1. item", "2) x", "> q", "---", "===", "~~~", "a\n\n# b", "\\", "\\|", "a\\", "$x$", "<!-- c -->",
    "https://evil.example/x", "\u202egnp.exe", "\x00\x1b[31m", "| a |\n|---|", "+ x", "a\u2028b", "\U0001f600", "<http://x.y>", "\ufffe", "\ufdd0", "\U0010ffff",
]  # fmt: skip
ANY_TEXT = st.one_of(
    st.sampled_from(HOSTILE), st.text(alphabet="`*_|\\[]()<>&#-+=~!$.1 aé\n\t\r\x00\u202e", max_size=24), st.text()
)
PARSER = MarkdownIt("commonmark", {"html": True}).enable("table")
PLAIN = {"text", "text_special", "softbreak"}


def one_line(value: str) -> str:
    return " ".join(visible(value).split())


def words(markdown: str) -> str:
    """The text a reader sees of one paragraph; fails if there is anything but text."""
    tokens = PARSER.parse(markdown)
    assert [t.type for t in tokens] == ["paragraph_open", "inline", "paragraph_close"] or not markdown
    children = tokens[1].children if tokens else []
    assert {child.type for child in children} <= PLAIN
    return "".join(child.content for child in children)


@given(ANY_TEXT)
def test_text_is_read_back_as_written_and_is_no_markup(value: str) -> None:
    assert words(text(value)) == one_line(value)


@given(ANY_TEXT, ANY_TEXT)
@example("a | b", "\ufffe")
@example("a", "\ufdd0 \U0010ffff")
def test_a_cell_cannot_leave_its_cell(first: str, second: str) -> None:
    tokens = PARSER.parse(table(["one", "two:"], [(first, code(second))]))
    cells = [tokens[i + 1].children for i, t in enumerate(tokens) if t.type == "td_open"]
    assert len(cells) == 2
    assert "".join(c.content for c in cells[0]) == one_line(first)
    assert "".join(c.content for c in cells[1] if c.type != "html_inline") == one_line(second)


@given(ANY_TEXT)
def test_inline_code_is_read_back_as_written(value: str) -> None:
    tokens = PARSER.parse("x " + code(value))
    children = tokens[1].children
    assert {c.content for c in children if c.type == "html_inline"} <= {"<code>", "</code>"}
    assert {c.type for c in children} <= PLAIN | {"code_inline", "html_inline"}
    assert "".join(c.content for c in children if c.type != "html_inline") == "x " + one_line(value) or not one_line(
        value
    )


@given(ANY_TEXT | st.text(alphabet="`~\n a"))
@example("a\n```\n# b")
@example("~~~\n````\n``````\nx")
def test_no_line_closes_a_fence_from_inside(value: str) -> None:
    tokens = PARSER.parse(fence(value) + "\n\nafter")
    assert [t.type for t in tokens] == ["fence", "paragraph_open", "inline", "paragraph_close"]
    assert tokens[0].content == (visible(value) if visible(value).endswith("\n") else visible(value) + "\n")


def test_what_cannot_be_seen_is_spelled_out() -> None:
    assert visible("a\u202eb\x00\r\nc\r") == "a[U+202E]b[U+0000]\nc[U+000D]"


def test_markdown_joined_by_python_is_escaped_again() -> None:
    assert finish("".join([Markdown("**a**")])) == r"\*\*a\*\*"
    assert joined([Markdown("**a**"), "*b*"]) == r"**a**, \*b\*"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (19_081_828_155, "19.08 GB (17.77 GiB)"),
        (5_486, "5,486 bytes"),
        (5_486_000, "5.49 MB (5.23 MiB)"),
        (None, None),
        ("9", None),
        (True, None),
    ],
)
def test_bytes_are_shown_decimal_and_binary_and_only_if_they_are_a_number(value: object, shown: str | None) -> None:
    assert gigabytes(value) == shown
    assert finish(None) == "not measured"
