"""The 25 instructions, each a function of the answer and its arguments that says whether it was followed. Strict: the text as it stands.

    checker(answer, arguments) -> bool      `CHECKERS` names them; `ARGUMENTS` says what each needs, and reading checks it

"at least n" means n or more, "less than n" fewer; both count what is written here and nothing cleverer:

    words          runs of letters, digits, underscores          paragraphs    between *** (or blank lines, where the prompt says so)
    highlights     *one line* or **one line**, not empty          bullets       lines that begin with "* " or "-"
    placeholders   [anything in brackets]                         title         <<not empty>>
    capital words  words all of whose letters are capitals        sections      the splitter's word, then a number

English-only instructions pass unless `languages` finds another language: a text too short to tell is not held against a model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from halfbyte.evaluator.tasks.ifeval.languages import language_of
from halfbyte.evaluator.tasks.ifeval.words import parts, sentences, words

Arguments = Mapping[str, Any]
Checker = Callable[[str, Arguments], bool]
RELATIONS = ("at least", "less than")
CONSTRAINED = ("my answer is yes.", "my answer is no.", "my answer is maybe.")


def _related(count: int, arguments: Arguments, relation: str, bound: str) -> bool:
    wanted = int(arguments[bound])
    return count >= wanted if arguments[relation] == "at least" else count < wanted


def _found(word: str, answer: str, *, whole: bool = False) -> int:
    """How often a word stands in the answer, in any case; `whole`: not inside a longer word."""
    pattern = re.escape(word)
    return len(re.findall(rf"(?<!\w){pattern}(?!\w)" if whole else pattern, answer, re.IGNORECASE))


def keywords_exist(answer: str, arguments: Arguments) -> bool:
    return all(_found(word, answer) for word in arguments["keywords"])


def keyword_frequency(answer: str, arguments: Arguments) -> bool:
    return _related(_found(arguments["keyword"], answer), arguments, "relation", "frequency")


def forbidden_words(answer: str, arguments: Arguments) -> bool:
    return not any(_found(word, answer, whole=True) for word in arguments["forbidden_words"])


def letter_frequency(answer: str, arguments: Arguments) -> bool:
    """Also of signs: the data ask for "#" and "!"."""
    return _related(answer.lower().count(arguments["letter"].lower()), arguments, "let_relation", "let_frequency")


def response_language(answer: str, arguments: Arguments) -> bool:
    return bool(language_of(answer) == arguments["language"])


def number_sentences(answer: str, arguments: Arguments) -> bool:
    return _related(len(sentences(answer)), arguments, "relation", "num_sentences")


def number_words(answer: str, arguments: Arguments) -> bool:
    return _related(len(words(answer)), arguments, "relation", "num_words")


def number_paragraphs(answer: str, arguments: Arguments) -> bool:
    """Paragraphs are separated by *** here; an empty one in the middle spoils it."""
    found = parts(answer, r"\*\*\*")
    return found is not None and len(found) == int(arguments["num_paragraphs"])


def nth_paragraph_first_word(answer: str, arguments: Arguments) -> bool:
    """Paragraphs are separated by blank lines here. Quotes before the word and marks behind it do not count."""
    found = [part.strip() for part in answer.split("\n\n") if part.strip()]
    nth = int(arguments["nth_paragraph"])
    if len(found) != int(arguments["num_paragraphs"]) or not 1 <= nth <= len(found):
        return False
    first = re.match(r"""["'“‘*_]*([^\s.,?!'"”’:;*_]+)""", found[nth - 1])
    return first is not None and first.group(1).lower() == arguments["first_word"].lower()


def number_placeholders(answer: str, arguments: Arguments) -> bool:
    return len(re.findall(r"\[[^\]\n]*\]", answer)) >= int(arguments["num_placeholders"])


def postscript(answer: str, arguments: Arguments) -> bool:
    """P.S. or P.P.S., in any case, with or without spaces between."""
    letters = [letter for letter in arguments["postscript_marker"] if letter.isalpha()]
    return re.search(r"(?<!\w)" + r"\.\s?".join(letters) + r"(?!\w)", answer, re.IGNORECASE) is not None


def number_bullets(answer: str, arguments: Arguments) -> bool:
    """Exactly so many lines that begin with "-" or with one "*" (two begin bold text)."""
    found = re.findall(r"^[ \t]*(?:\*[^*\n]|-[^\n])", answer, re.MULTILINE)
    return len(found) == int(arguments["num_bullets"])


def number_highlights(answer: str, arguments: Arguments) -> bool:
    bold = [inner for inner in re.findall(r"\*\*([^*\n]+)\*\*", answer) if inner.strip()]
    rest = re.sub(r"\*\*[^*\n]+\*\*", " ", answer)
    slanted = [inner for inner in re.findall(r"\*([^*\n]+)\*", rest) if inner.strip()]
    return len(bold) + len(slanted) >= int(arguments["num_highlights"])


def multiple_sections(answer: str, arguments: Arguments) -> bool:
    mark = re.escape(arguments["section_spliter"])
    return len(re.findall(rf"(?<!\w){mark}\s?\d+", answer)) >= int(arguments["num_sections"])


def constrained_response(answer: str, arguments: Arguments) -> bool:
    lowered = answer.lower()
    return any(sentence in lowered for sentence in CONSTRAINED)


def json_format(answer: str, arguments: Arguments) -> bool:
    """The whole answer is JSON; a fence around it is forgiven."""
    inner = re.sub(r"^```(?:json)?\s*\n?|\n?```$", "", answer.strip(), flags=re.IGNORECASE)
    try:
        json.loads(inner)
    except (ValueError, RecursionError):
        return False
    return True


def title(answer: str, arguments: Arguments) -> bool:
    return any(found.strip(" <>") for found in re.findall(r"<<([^\n]+?)>>", answer))


def repeat_prompt(answer: str, arguments: Arguments) -> bool:
    """The answer begins with the request, word for word (case aside)."""
    return answer.strip().lower().startswith(arguments["prompt_to_repeat"].strip().lower())


def two_responses(answer: str, arguments: Arguments) -> bool:
    """Two different ones, separated by six asterisks."""
    found = parts(answer, r"\*{6}")
    return found is not None and len(found) == 2 and found[0] != found[1]


def english_capital(answer: str, arguments: Arguments) -> bool:
    return answer.isupper() and language_of(answer) in ("en", None)


def english_lowercase(answer: str, arguments: Arguments) -> bool:
    return answer.islower() and language_of(answer) in ("en", None)


def capital_word_frequency(answer: str, arguments: Arguments) -> bool:
    """ "WELL-KNOWN" is one word, "I" and "A" are capital words."""
    found = sum(word.isupper() for word in re.findall(r"\w+(?:[-'’]\w+)*", answer))
    return _related(found, arguments, "capital_relation", "capital_frequency")


def no_comma(answer: str, arguments: Arguments) -> bool:
    return "," not in answer


def end_checker(answer: str, arguments: Arguments) -> bool:
    """Nothing follows the phrase; a quotation mark may."""
    return answer.strip().strip('"').rstrip().lower().endswith(arguments["end_phrase"].strip().lower())


def quotation(answer: str, arguments: Arguments) -> bool:
    found = answer.strip()
    return len(found) > 1 and found[0] == found[-1] == '"'


CHECKERS: Mapping[str, Checker] = {
    "keywords:existence": keywords_exist,
    "keywords:frequency": keyword_frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullets,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlights,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}

#: argument -> what it must be
_COUNT, _TEXT, _TEXTS, _RELATION = "a whole number", "a text", "texts", "a relation"
ARGUMENTS: Mapping[str, Mapping[str, str]] = {
    "keywords:existence": {"keywords": _TEXTS},
    "keywords:frequency": {"keyword": _TEXT, "relation": _RELATION, "frequency": _COUNT},
    "keywords:forbidden_words": {"forbidden_words": _TEXTS},
    "keywords:letter_frequency": {"letter": _TEXT, "let_relation": _RELATION, "let_frequency": _COUNT},
    "language:response_language": {"language": "a language"},
    "length_constraints:number_sentences": {"relation": _RELATION, "num_sentences": _COUNT},
    "length_constraints:number_paragraphs": {"num_paragraphs": _COUNT},
    "length_constraints:number_words": {"relation": _RELATION, "num_words": _COUNT},
    "length_constraints:nth_paragraph_first_word": {"first_word": _TEXT, "num_paragraphs": _COUNT, "nth_paragraph": _COUNT},
    "detectable_content:number_placeholders": {"num_placeholders": _COUNT},
    "detectable_content:postscript": {"postscript_marker": _TEXT},
    "detectable_format:number_bullet_lists": {"num_bullets": _COUNT},
    "detectable_format:number_highlighted_sections": {"num_highlights": _COUNT},
    "detectable_format:multiple_sections": {"section_spliter": _TEXT, "num_sections": _COUNT},
    "combination:repeat_prompt": {"prompt_to_repeat": _TEXT},
    "startend:end_checker": {"end_phrase": _TEXT},
    "change_case:capital_word_frequency": {"capital_relation": _RELATION, "capital_frequency": _COUNT},
}  # fmt: skip
