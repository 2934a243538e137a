"""An evaluate record and its vectors -> one HTML page that can be opened, sent and printed; and a section for a model card.

    page      record -> values of the template, escaped by jinja2 (autoescape: strings of strangers stay text)
    frames    figures from outside a model's frame beside sound ones
    tasks     right answers, flips and verdicts of the tasks
    plots     vectors -> inline SVG in the page's own colours
    words     numbers and verdicts as text
    section   the same figures as Markdown

Needs no torch: vectors are read with numpy, plots are drawn with matplotlib. What the record lacks prints "not measured".
"""

from halfbyte.cards.report.page import report
from halfbyte.cards.report.section import section

__all__ = ["report", "section"]
