"""Which language a text is in, without a model: the script first, then the commonest words of languages that share it.

Most of IFEval's languages have a script of their own. Arabic, Persian and Urdu differ in letters that only one of them has; Russian and
Bulgarian in letters and words; the languages of Devanagari and of Latin letters are told apart by their function words, which
make up a third of any prose.

The catch: only the languages below are known. A text in Danish has no function words that count here or is taken for a
neighbour; one of three words is unknown. A prompt that asks for a language outside the table is refused when it is read.
"""

from __future__ import annotations

import re
import unicodedata

#: first and last code point of each script -> language, or a group of languages
SCRIPTS = {
    "latin": ((0x41, 0x24F), (0x1E00, 0x1EFF)), "cyrillic": ((0x400, 0x4FF),), "arabic": ((0x600, 0x6FF), (0x750, 0x77F)),
    "devanagari": ((0x900, 0x97F),), "bn": ((0x980, 0x9FF),), "pa": ((0xA00, 0xA7F),), "gu": ((0xA80, 0xAFF),),
    "ta": ((0xB80, 0xBFF),), "te": ((0xC00, 0xC7F),), "kn": ((0xC80, 0xCFF),), "ml": ((0xD00, 0xD7F),), "th": ((0xE00, 0xE7F),),
    "ko": ((0xAC00, 0xD7A3), (0x1100, 0x11FF), (0x3130, 0x318F)), "ja": ((0x3040, 0x30FF),), "zh": ((0x4E00, 0x9FFF),),
    "el": ((0x370, 0x3FF),), "he": ((0x590, 0x5FF),),
}  # fmt: skip
#: language -> its commonest words and, behind |, letters (or, with spaces between, endings) that its neighbours lack
LATIN = {
    "en": "the of and to in is that for it with as was on are be this you by at have not but from they we his her or an will can",
    "de": "der die das und ist nicht ein eine zu den mit von für auf im sich dem es auch als wie ich sie wir wird sind bei | ßäöü",
    "fr": "le la les des et est une du que qui dans pour pas sur avec vous nous ce il elle sont au aux par mais ou cette | çèêàùœ",
    "es": "el la los las y es una que en por para con del se no un al lo como más su pero está son este esta muy | ñ¿¡",
    "pt": "o a os as e é uma que em por para com do da dos das não um no na se mais como sua você ao foi são | ãõ",
    "it": "il la le gli e è una che di in per con del della non un al si come più sono nel alla questo anche lo dei ma | ìò",
    "nl": "de het een en is niet van dat in te op met voor zijn aan ook als maar om bij naar wordt je hij dit",
    "fi": "ja on ei se että oli hän mutta kun myös ovat olla tai niin kuin jos voi sen mukaan minä sinä tämä joka | äö",
    "sw": "na ya wa kwa ni katika za la kama hii cha yake watu huo hilo hizo kuwa pia au lakini yako kila sana mimi wewe",
    "vi": "và của là có không được trong cho một các với những người này đã để khi tôi bạn cũng như về | ơưđăạảấầậắằếềệỉịọốồộớờợụứừựỳ",
    "sv": "och att det är en som på för med av inte den till har om ett jag var men | åäö",
    "pl": "i w nie na się że jest do to z jak co ale o po od za tak już | łśżźćńęą",
    "tr": "ve bir bu için ile da de çok olarak daha gibi olan ne değil ama | ışğ",
    "id": "yang dan di ini itu dengan untuk tidak dari dalam akan pada juga saya ke karena",
}  # fmt: skip
CYRILLIC = {
    "ru": "и в не на что с он как это по но из у за от так же для вы мы бы был её его их при или если | ыэё",
    "bg": "и в не на че с е за се да от по като са това към при или ще си със които може след беше | ъщ",
    "uk": "і в не на що з як це та до у за від але для є ми ви його її або якщо | іїєґ",
}  # fmt: skip
DEVANAGARI = {
    "hi": "है हैं के की का को में से और पर ने कि यह वह नहीं एक भी हो था थे थी इस लिए करने साथ आप हम",
    "mr": "आहे आहेत आणि च्या ची चा चे मध्ये हे ही हा नाही एक तर पण करण्यासाठी केले होते होता त्या त्यांच्या असे किंवा साठी मी तुम्ही",
    "ne": "छ छन् र को का मा लाई ले यो हो पनि गर्न भएको गर्ने हुन् छैन तर एक भने थियो हुन्छ तपाईं गरेको म हामी | नुहोस् हरू बाट लाई",
}  # fmt: skip
#: letters that only one language of the Arabic script has among the three
ARABIC = {"ur": "ٹڈڑںےہھ", "fa": "پچژگکی", "ar": "ةىكيأإؤئ"}
KNOWN = frozenset(LATIN) | frozenset(CYRILLIC) | frozenset(DEVANAGARI) | frozenset(ARABIC) | {
    name for name in SCRIPTS if len(name) == 2
}  # fmt: skip
_LATIN, _CYRILLIC, _DEVANAGARI = (
    {name: ((frozenset((pair := row.partition("|"))[0].split())), frozenset(pair[2].split() if " " in pair[2].strip() else pair[2].strip())) for name, row in table.items()}
    for table in (LATIN, CYRILLIC, DEVANAGARI)
)  # fmt: skip
#: share of words that must be known before a language of a shared script is believed
LEAST = 0.08
FEWEST = 4


def language_of(text: str) -> str | None:
    """ISO 639-1 code of the language most of the text is in; None if it cannot be told."""
    text = unicodedata.normalize("NFC", text).lower()
    counts = dict.fromkeys(SCRIPTS, 0)
    for letter in text:
        if letter.isalpha() or unicodedata.category(letter) in ("Mn", "Mc"):
            point = ord(letter)
            for name, ranges in SCRIPTS.items():
                if any(first <= point <= last for first, last in ranges):
                    counts[name] += 1
                    break
    script = max(counts, key=lambda name: counts[name])
    if not counts[script]:
        return None
    if script == "zh" and counts["ja"] > 0.1 * counts["zh"]:
        return "ja"
    if script == "arabic":
        return _by_letters(text)
    tables = {"latin": _LATIN, "cyrillic": _CYRILLIC, "devanagari": _DEVANAGARI}
    return _by_words(text, tables[script]) if script in tables else script


def _by_letters(text: str) -> str | None:
    """Urdu's own letters outweigh Persian's, which it also uses; both outweigh Arabic's, which are shared by older spellings."""
    found = {name: sum(text.count(letter) for letter in letters) for name, letters in ARABIC.items()}
    if found["ur"] > 0 and found["ur"] >= 0.1 * found["fa"]:
        return "ur"
    if found["fa"] > found["ar"]:
        return "fa"
    return "ar"


def _by_words(text: str, table: dict[str, tuple[frozenset[str], frozenset[str]]]) -> str | None:
    """The language whose words are met most; a letter of its own counts as a third of a word."""
    # marks are part of words in Devanagari, and \w leaves some of them out
    found = re.findall(r"[^\W\d_](?:[^\W\d_]|[\u0900-\u0963])*", text)
    if len(found) < FEWEST:
        return None
    scores = {
        name: sum(word in common for word in found) + sum(text.count(letter) for letter in letters) / 3
        for name, (common, letters) in table.items()
    }
    best = max(scores, key=lambda name: scores[name])
    return best if scores[best] >= LEAST * len(found) else None
