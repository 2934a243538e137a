"""IFEval: did the answer obey instructions that a program can check (Zhou et al. 2023, arXiv:2311.07911, `input_data.jsonl`)?

reading      the file -> items; instructions and their arguments are checked while reading, not while grading
following    instruction id -> checker: what stands in an answer, by our own reading of the paper's 25 instructions
words        words, sentences, paragraphs
languages    which language a text is in, by script and by its commonest words

Written anew, not copied: where the original leans on nltk (sentences, words) and langdetect (languages), rules of our own stand
here, so figures are near those of other harnesses and not equal to them. Both models are graded by the same rules.
"""

from halfbyte.evaluator.tasks.ifeval.reading import read_ifeval

__all__ = ["read_ifeval"]
