"""Image tasks: name the shape, read the digit, or name the shape of one of several images."""

from __future__ import annotations

import random
from typing import Any, Final

from srt.builtin.tasks.drawing import digit_picture, random_shape
from srt.builtin.tasks.example import Example, Picture

IMAGES_MIN, IMAGES_MAX = 2, 4

# Font files to draw digits with besides the built-in ways; training adds some, evaluation none.
EXTRA_FONTS: Final[list[str]] = []


def describe(picture: Picture) -> str:
    """Return `a red circle`, with the article that the colour needs."""
    colour = picture.label["colour"]
    article = "an" if colour[0] in "aeiou" else "a"
    return f"{article} {colour} {picture.label['shape']}"


def object_group(rng: random.Random, size: int, effort: str | None) -> list[Example]:
    """`What is in the image?`"""
    del size
    picture = random_shape(rng)
    seen = describe(picture)
    thinking = {"low": seen.split(" ", 1)[1], "high": f"I see {seen}. Again: {seen}."}.get(
        effort or "", f"I see {seen}"
    )
    return [_example(rng, "image_object", [picture], "What is in the image?", thinking, seen, effort)]


def digit_group(rng: random.Random, size: int, effort: str | None) -> list[Example]:
    """`Which digit is in the image?`"""
    del size
    digit = str(rng.randint(0, 9))
    picture = digit_picture(rng, digit, EXTRA_FONTS)
    thinking = {"low": digit, "high": f"I see {digit}. Again: {digit}."}.get(effort or "", f"I see {digit}")
    return [_example(rng, "image_digit", [picture], "Which digit is in the image?", thinking, digit, effort)]


def many_group(rng: random.Random, size: int, effort: str | None) -> list[Example]:
    """`What is in image {k}?` about 2 to 4 images; the reasoning names them in order up to k."""
    pictures = [random_shape(rng) for _ in range(rng.randint(IMAGES_MIN, IMAGES_MAX))]
    layout = rng.random()
    examples = []
    for index in rng.sample(range(len(pictures)), min(size, len(pictures))):
        named = [f"{k} {describe(picture)}" for k, picture in enumerate(pictures[: index + 1], start=1)]
        steps = " ".join(named)
        thinking = {"low": named[-1], "high": f"{steps}. Again: {named[-1]}."}.get(effort or "", steps)
        question = f"What is in image {index + 1}?"
        answer = describe(pictures[index])
        examples.append(_example(rng, "image_many", pictures, question, thinking, answer, effort, layout=layout))
    return examples


def _example(
    rng: random.Random,
    family: str,
    pictures: list[Picture],
    question: str,
    thinking: str,
    answer: str,
    effort: str | None,
    layout: float | None = None,
) -> Example:
    parts: list[dict[str, Any]] = [{"type": "image", "image": index} for index in range(len(pictures))]
    text = {"type": "text", "text": question}
    text_first = (rng.random() if layout is None else layout) < 0.25
    return Example(
        family=family,
        key=f"{question} {rng.getrandbits(48)}",
        messages=[{"role": "user", "content": [text, *parts] if text_first else [*parts, text]}],
        thinking=thinking,
        answer=answer,
        pictures=tuple(pictures),
        effort=effort,
    )
