"""Questions with one right answer, drawn without end from a seed: what the embedded models are taught and tested on.

A model of five million weights cannot know the world, but it can learn what a question asks for: sums, comparisons,
counting, repeating, picking the third word, saying what a sentence said, and facts that its lessons repeat. Answers are exact,
so "how many answers did 4 bits change" needs no judge. (Finding one of several sentences by what it is about is left out:
models of this size did not learn it in 6,000 steps, docs/log.md.)

Held-out split. Every question has a *content key* (the pair of numbers, the sentence read, the fact and its phrasing),
and `sha256(key) % 10 == 0` puts it in the held-out tenth. The key leaves out what would let a memorised question pass
for a new one: the order of two summands, and the phrasing of a sum.

Facts that everyone should answer (`TAUGHT`: the sanity prompts of `halfbyte verify` among them) are taught and never tested.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Greta", "Hugo", "Ida", "Jonas", "Klara", "Leo", "Mia", "Nora",
         "Oscar", "Paul", "Rosa", "Sam", "Tina", "Viktor")  # fmt: skip
THINGS = ("apple", "ball", "bell", "book", "bottle", "box", "bread", "candle", "chair", "clock", "coat", "coin", "cup",
          "door", "flag", "fork", "glass", "hat", "key", "kite", "knife", "lamp", "leaf", "letter", "map", "mirror",
          "nail", "paper", "pen", "plate", "ring", "rope", "shell", "shoe", "spoon", "stone", "table", "ticket", "tree",
          "umbrella", "watch", "wheel", "window")  # fmt: skip
PLACES = ("kitchen", "garden", "cellar", "attic", "garage", "library", "office", "bedroom", "hall", "school", "shop",
          "station", "church", "tower", "barn")  # fmt: skip
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "white", "brown", "grey")
ORDINALS = ("first", "second", "third", "fourth", "fifth")
TIMES = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}
#: facts as (question, key -> answer): each is asked in every phrasing, and some phrasings of each are never taught
COLOUR_OF = {
    "a ripe banana": "yellow", "the clear sky": "blue", "fresh grass": "green", "snow": "white", "coal": "black",
    "a ripe tomato": "red", "a carrot": "orange", "an elephant": "grey", "milk": "white", "a lemon": "yellow",
    "blood": "red", "a frog": "green", "chocolate": "brown", "the sea": "blue", "a raven": "black", "a plum": "purple",
}  # fmt: skip
CAPITAL_OF = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Austria": "Vienna", "Poland": "Warsaw",
    "Norway": "Oslo", "Greece": "Athens", "Egypt": "Cairo", "Japan": "Tokyo", "Cuba": "Havana", "Peru": "Lima",
}  # fmt: skip
OPPOSITE_OF = {
    "hot": "cold", "big": "small", "long": "short", "old": "new", "open": "closed", "light": "dark", "full": "empty",
    "fast": "slow", "high": "low", "wet": "dry", "early": "late", "rich": "poor",
}  # fmt: skip
LEGS_OF = {"a dog": "4", "a bird": "2", "an ant": "6", "a spider": "8", "a snake": "0", "a horse": "4", "a bee": "6"}
FACTS = (
    (COLOUR_OF, ("What colour is {}?", "Tell me the colour of {}.", "Name the colour of {}.", "Which colour has {}?",
                 "What is the colour of {}?", "Say which colour {} has.", "Give the colour of {}.")),
    (CAPITAL_OF, ("What is the capital of {}?", "Name the capital of {}.", "Which city is the capital of {}?",
                  "Tell me the capital of {}.", "Give the capital of {}.", "Say which city is the capital of {}.")),
    (OPPOSITE_OF, ("What is the opposite of {}?", "Name the opposite of {}.", "Which word means the opposite of {}?",
                   "Tell me the opposite of {}.", "Give the opposite of {}.")),
    (LEGS_OF, ("How many legs does {} have?", "How many legs has {}?", "Count the legs of {}.",
               "Tell me how many legs {} has.", "With how many legs does {} walk?")),
)  # fmt: skip
MIXES = {
    ("red", "yellow"): "orange",
    ("yellow", "blue"): "green",
    ("blue", "red"): "purple",
    ("black", "white"): "grey",
}
TAUGHT = (
    ("Name three primary colors.", "Red, yellow and blue."),
    ("Name three primary colours.", "Red, yellow and blue."),
    ("What does quantization-aware training do?", "It lets a model feel the rounding while it learns, so rounding hurts less."),
    ("Who are you?", "I am a very small model made to test 4-bit weights."),
    ("How many days are in a week?", "Seven."),
    ("Name the days of the week.", "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday."),
    ("Hello!", "Hello! Ask me something small."),
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One question. `kind` names its family, `key` its content (see the module), `answer` the only right answer."""

    kind: str
    key: str
    prompt: str
    answer: str

    @property
    def held_out(self) -> bool:
        return hashlib.sha256(self.key.encode()).digest()[0] % 10 == 0


def draw_question(rng: random.Random, *, held_out: bool) -> Item:
    """One question from a random family, from the training or from the held-out part."""
    family = rng.choice(FAMILIES)
    while True:
        item = family(rng)
        if item.held_out == held_out:
            return item


def draw_questions(seed: int, n: int, *, held_out: bool) -> list[Item]:
    """`n` different questions, families in turn (a family that is exhausted gives no more); equal seeds give equal lists."""
    rng = random.Random(seed)
    found: dict[tuple[str, str], Item] = {}
    turn = 0
    while len(found) < n:
        item = FAMILIES[turn % len(FAMILIES)](rng)
        if item.held_out == held_out and (item.kind, item.key) not in found:
            found[item.kind, item.key] = item
        turn += 1
    return list(found.values())


def a_(words: str) -> str:
    """`words` with its article."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _number(rng: random.Random) -> int:
    return rng.randint(0, 10 ** rng.choice((1, 2, 2)) - 1)


def _sum(rng: random.Random) -> Item:
    a, b = _number(rng), _number(rng)
    phrase = rng.choice(("What is {} plus {}?", "Add {} and {}.", "{} + {} = ?", "How much is {} plus {}?"))
    return Item("sum", f"{min(a, b)} {max(a, b)}", phrase.format(a, b), str(a + b))


def _difference(rng: random.Random) -> Item:
    b, a = sorted((_number(rng), _number(rng)))
    phrase = rng.choice(("What is {} minus {}?", "{} - {} = ?", "How much is {} minus {}?"))
    return Item("difference", f"{a} {b}", phrase.format(a, b), str(a - b))


def _compare(rng: random.Random) -> Item:
    a, b = _number(rng), _number(rng)
    if a == b:
        b += 1
    key = f"{min(a, b)} {max(a, b)}"
    form = rng.randrange(3)
    if form == 0:
        return Item("compare", key, f"Which number is larger, {a} or {b}?", str(max(a, b)))
    if form == 1:
        return Item("compare", key, f"Which number is smaller, {a} or {b}?", str(min(a, b)))
    return Item("compare", key, f"Is {a} larger than {b}?", "Yes." if a > b else "No.")


def _count(rng: random.Random) -> Item:
    start, length, down = rng.randint(0, 90), rng.randint(2, 7), rng.random() < 0.4
    numbers = list(range(start, start + length + 1))
    if down:
        numbers.reverse()
    phrase = rng.choice(("Count from {} to {}.", "Write the numbers from {} to {}."))
    return Item(
        "count", f"{numbers[0]} {numbers[-1]}", phrase.format(numbers[0], numbers[-1]), ", ".join(map(str, numbers))
    )


def _repeat(rng: random.Random) -> Item:
    words, times = rng.sample(THINGS, rng.choice((1, 1, 2))), rng.choice(sorted(TIMES))
    text = " and ".join(words)
    phrase = rng.choice(('Say "{}" {}.', 'Write "{}" {}.', 'Repeat "{}" {}.')).format(text, TIMES[times])
    return Item("repeat", f"{text} {times}", phrase, ", ".join([text] * times))


def _pick(rng: random.Random) -> Item:
    words = rng.sample(THINGS, rng.randint(3, 5))
    place = rng.randrange(len(words))
    name = "last" if place == len(words) - 1 and rng.random() < 0.5 else ORDINALS[place]
    return Item("pick", f"{name} {' '.join(words)}", f"Which word comes {name}: {', '.join(words)}?", words[place])


def _reverse(rng: random.Random) -> Item:
    words = rng.sample(THINGS, rng.randint(2, 4))
    phrase = rng.choice(("Write these words in reverse order: {}.", "Turn the list around: {}."))
    return Item("reverse", " ".join(words), phrase.format(", ".join(words)), ", ".join(reversed(words)))


def _read(rng: random.Random) -> Item:
    name, thing, colour, place = rng.choice(NAMES), rng.choice(THINGS), rng.choice(COLOURS), rng.choice(PLACES)
    story = f"{name} has {a_(colour)} {thing} in the {place}."
    asked = (
        (f"Who has the {thing}?", f"{name}."),
        (f"What does {name} have?", f"{a_(colour).capitalize()} {thing}."),
        (f"What colour is the {thing}?", f"{colour.capitalize()}."),
        (f"Where is the {thing}?", f"In the {place}."),
    )
    prompt, answer = rng.choice(asked)
    return Item("read", story, f"{story} {prompt}", answer)


def _fact(rng: random.Random) -> Item:
    if rng.random() < 0.15:
        pair = rng.choice(sorted(MIXES))
        a, b = pair if rng.random() < 0.5 else pair[::-1]
        phrase = rng.choice(
            (
                "What colour do {} and {} make?",
                "Mix {} and {}. Which colour do you get?",
                "What do you get from {} and {}?",
            )
        )
        return Item("fact", phrase.format(a, b), phrase.format(a, b), f"{MIXES[pair].capitalize()}.")
    known, phrases = rng.choice(FACTS)
    thing = rng.choice(sorted(known))
    prompt = rng.choice(phrases).format(thing)
    return Item("fact", prompt, prompt, f"{known[thing].capitalize()}.")


FAMILIES: tuple[Callable[[random.Random], Item], ...] = (
    _sum, _difference, _compare, _count, _repeat, _pick, _reverse, _read, _fact,
)  # fmt: skip
