"""Questions about pictures: what is asked, rows with pixels, a model that sees, and the reference's own answers.

prompts   JSON lines with an image each, every one of them checked before a weight is read
rows      token rows that carry what the processor made of their picture
model     decoder, head *and* towers; hidden states as the scorer wants them
drawn     pictures of our own, drawn by arithmetic, for calibration
shown     pictures among calibration rows
answers   the reference answers once, greedily, and the answers are kept in a file
"""
