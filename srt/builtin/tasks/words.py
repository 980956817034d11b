"""Closed word lists of the tasks, and a source of arbitrary words and texts."""

from __future__ import annotations

import random
from typing import Final


def _several(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES: Final = _several("Ada Grace Alan Linus Marie Isaac Nina Oscar Paul Rosa Tom Vera Emma Hugo Lena Max")
CITIES: Final = _several("Paris London Berlin Madrid Rome Vienna Oslo Tokyo Cairo Lima")
WEATHER: Final = _several("sunny cloudy rainy windy")
COLOURS: Final = _several("red green blue yellow orange purple black")
SHAPES: Final = _several("circle square triangle star")

KNOWN: Final = _several(
    """apple pear plum peach lemon cherry mango grape melon banana kiwi fig date olive onion carrot potato tomato bread
    butter cheese honey sugar salt pepper rice bean soup cake tea coffee water milk juice wine dog cat horse sheep
    cow pig goat mouse rabbit tiger lion bear wolf fox deer eagle duck goose swan owl fish shark whale crab snake
    frog ant bee spider tree leaf root seed flower rose grass forest river lake ocean island beach mountain valley
    desert hill stone sand rock metal iron gold silver copper glass paper wood cotton silk wool leather table chair
    door window wall floor roof house garden bridge road street city town village castle tower school library
    hospital market station harbour ship boat train car truck bicycle plane rocket planet moon sun star comet cloud
    rain snow wind storm thunder light shadow fire smoke ice winter summer spring autumn morning evening night day
    week month year clock watch book letter pencil brush paint music song piano guitar violin drum flute dance movie
    theatre game puzzle ball team coach player king queen prince knight doctor nurse teacher student farmer baker
    pilot sailor artist writer poet friend brother sister mother father uncle aunt child baby heart hand foot head
    eye ear nose mouth shirt jacket hat shoe glove scarf ring button pocket mirror lamp candle bottle cup plate
    spoon fork knife basket box bag key lock rope wheel engine hammer nail screw ladder bucket broom needle thread
    code word tool name age image number add red green blue yellow orange purple black circle square triangle sunny
    cloudy rainy windy hello world python server model token cache batch kernel tensor memory page the and you are
    with from this that what who have weather string integer function result reverse sort count these numbers give
    look"""
)
_ONSETS: Final = _several("b c d f g h j k l m n p r s t v w z br cl dr fl gr pl sh st th tr qu x y")
_VOWELS: Final = _several("a e i o u ai ea ou a e i o u")
_CODAS: Final = ("", "", "", "n", "r", "s", "t", "l", "m", "nd", "st", "ck", "x")
_LETTERS: Final = "abcdefghijklmnopqrstuvwxyz"


def word(rng: random.Random) -> str:
    """Return a lowercase word of 3 to 8 letters, known or made up."""
    kind = rng.random()
    if kind < 0.3:
        return rng.choice(KNOWN)
    length = rng.randint(3, 8)
    if kind < 0.6:
        return "".join(rng.choices(_LETTERS, k=length))
    letters = ""
    while len(letters) < length:
        letters += rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
    return letters[:length]


def distinct_words(rng: random.Random, count: int) -> list[str]:
    """Return `count` different words."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[word(rng)] = None
    return list(found)


def code(rng: random.Random) -> str:
    """Return four digits, leading zeros included."""
    return f"{rng.randrange(10_000):04d}"


def sentence(rng: random.Random, words_max: int = 9) -> str:
    """Return an arbitrary short text, as a tool's description or a system prompt might be."""
    text = " ".join(word(rng) for _ in range(rng.randint(1, words_max)))
    if rng.random() < 0.15:
        text += " " + str(rng.randrange(1000))
    if rng.random() < 0.6:
        text = text.capitalize()
    return text + rng.choice(("", ".", ".", "!", "?"))
