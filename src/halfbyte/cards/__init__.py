"""Records in, model card out; and the checkpoint with its card up to the hub.

    evidence      the records, each held against the weights it claims to speak of
    inventory     every byte on disk, by area of the model, or an error
    sections      records -> the values of each section
    front_matter  the YAML that the hub reads
    usage         the program a reader can run
    markdown      how text from strangers gets into a page without becoming part of it
    writing       template + sections -> README.md
    upload        push, which refuses what is not verified

Never imports torch: a card can be written on a laptop from records alone.
"""

from halfbyte.cards.upload import push
from halfbyte.cards.usage import usage_snippet
from halfbyte.cards.writing import card

__all__ = ["card", "push", "usage_snippet"]
