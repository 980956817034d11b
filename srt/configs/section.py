"""Reading a JSON object key by key: each key has a default or its absence is an error that names it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeGuard, TypeVar

from srt.errors import StartupError

T = TypeVar("T")


class Section:
    """One JSON object of a config file.

    Each reader takes one name, or several spellings of which the first that is present and not null counts.
    Raises: StartupError with the full path of the key and the value when the type is wrong, or when the key is
    absent and no default was given.
    """

    def __init__(self, values: Mapping[str, object], where: str) -> None:
        self._values = values
        self.where = where

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def names(self) -> list[str]:
        """The keys that are present."""
        return list(self._values)

    def values(self) -> dict[str, object]:
        """The object as it was read."""
        return dict(self._values)

    def raw(self, name: str) -> object:
        """A value of any type; None where the key is absent or null."""
        return self._values.get(name)

    def integer(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least `least`: nearly all of them count something."""
        return self._required(names, self.maybe_integer(*names, least=least), default)

    def maybe_integer(self, *names: str, least: int = 1) -> int | None:
        """A whole number, or None where the key is absent or null."""
        name, value = self._find(names)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.wrong(name, value, f"a whole number of at least {least}")
        return value

    def number(self, *names: str, default: float | None = None) -> float:
        """A finite number above 0."""
        name, value = self._find(names)
        if value is not None and not _is_positive(value):
            raise self.wrong(name, value, "a number above 0")
        return self._required(names, None if value is None else float(value), default)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        _, value = self._find((name,))
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def text(self, *names: str, default: str | None = None) -> str:
        """A string."""
        name, value = self._find(names)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, value, "a string")
        return self._required(names, value, default)

    def section(self, name: str) -> Section:
        """A nested object."""
        found = self.maybe_section(name)
        return self._required((name,), found, None)

    def maybe_section(self, name: str) -> Section | None:
        """A nested object, or None where the key is absent or null."""
        _, value = self._find((name,))
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, value, "an object")
        return Section(value, f"{self.where}.{name}")

    def items(self, name: str) -> list[object] | None:
        """A list, or None where the key is absent or null."""
        _, value = self._find((name,))
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.wrong(name, value, "a list")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """Whole numbers: one, a list of them, or a string with commas; empty where the key is absent or null."""
        _, value = self._find((name,))
        listed = [] if value is None else value if isinstance(value, list) else [value]
        if isinstance(value, str):
            listed = [int(item) if item.strip().isdecimal() else item for item in value.split(",") if item.strip()]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in listed):
            raise self.wrong(name, value, "a whole number or a list of them")
        return tuple(listed)

    def numbers(self, name: str) -> list[float]:
        """One finite number above 0, or a list of them; empty where the key is absent or null."""
        _, value = self._find((name,))
        listed = [] if value is None else value if isinstance(value, list) else [value]
        numbers = [float(item) for item in listed if _is_positive(item)]
        if len(numbers) < len(listed):
            raise self.wrong(name, value, "a number above 0 or a list of them")
        return numbers

    def numbers_or_nulls(self, name: str) -> list[float | None] | None:
        """A list of numbers and nulls, or None where the key is absent or null."""
        values = self.items(name)
        if values is None:
            return None
        numbers: list[float | None] = []
        for value in values:
            if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
                raise self.wrong(name, values, "a list of numbers and nulls")
            numbers.append(None if value is None else float(value))
        return numbers

    def texts(self, name: str) -> list[str] | None:
        """A list of strings, or None where the key is absent or null."""
        values = self.items(name)
        if values is None:
            return None
        if not all(isinstance(value, str) for value in values):
            raise self.wrong(name, values, "a list of strings")
        return [str(value) for value in values]

    def demand(self, name: str, served: object) -> None:
        """Fail unless the key is absent or has the one value that this model is served with."""
        _, value = self._find((name,))
        if value is not None and value != served:
            raise self.wrong(name, value, f"{served!r}, the only value that is supported")

    def wrong(self, name: str, value: object, rule: str) -> StartupError:
        """The error for a key with a value that breaks `rule`."""
        return StartupError(f"{self.where}.{name} is {value!r}, it must be {rule}")

    def _find(self, names: Sequence[str]) -> tuple[str, object]:
        for name in names:
            value = self._values.get(name)
            if value is not None:
                return name, value
        return names[0], None

    def _required(self, names: Sequence[str], value: T | None, default: T | None) -> T:
        if value is not None:
            return value
        if default is None:
            raise StartupError(f"{self.where} lacks {' (or '.join(names)}{')' * (len(names) - 1)}")
        return default


def _is_positive(value: object) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
