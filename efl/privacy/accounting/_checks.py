"""Checks of arguments: each names the argument, what arrived and what was expected."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

from efl.errors import ConfigError


def whole(where: str, name: str, value: object, least: int = 1) -> int:
    """An int of at least ``least``, or a ConfigError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ConfigError(f"{where}: {name}={value!r}: expected a whole number of at least {least}")
    return int(value)


def real(where: str, name: str, value: object, least: float, expected: str, open_end: bool = False) -> float:
    """A finite number of at least ``least`` (above it where ``open_end``), or a ConfigError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ConfigError(f"{where}: {name}={value!r}: expected {expected}")
    number = float(value)
    if not math.isfinite(number) or number < least or (open_end and number == least):
        raise ConfigError(f"{where}: {name}={value!r}: expected {expected}")
    return number


def noise(where: str, value: object) -> float:
    """A noise multiplier."""
    return real(where, "noise_multiplier", value, 0, "a number of at least 0: the noise's deviation over the clip")


def probability(where: str, name: str, value: object) -> float:
    """A number in (0, 1]."""
    number = real(where, name, value, 0, "a number above 0 and at most 1", open_end=True)
    if number > 1:
        raise ConfigError(f"{where}: {name}={value!r}: expected a number above 0 and at most 1")
    return number


def delta_of(where: str, value: object) -> float:
    """A delta, strictly between 0 and 1."""
    expected = "a number strictly between 0 and 1; well below 1/n, the number of rows, is usual"
    number = real(where, "delta", value, 0, expected, open_end=True)
    if number >= 1:
        raise ConfigError(f"{where}: delta={value!r}: expected {expected}")
    return number


def choice(where: str, name: str, value: object, allowed: Sequence[str]) -> str:
    """One of a few words."""
    if not isinstance(value, str) or value not in allowed:
        words = " or ".join(repr(word) for word in allowed)
        raise ConfigError(f"{where}: {name}={value!r}: expected {words}")
    return value
