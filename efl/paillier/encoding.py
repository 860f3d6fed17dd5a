"""Fixed-point numbers: real numbers as integers at a scale of a power of two.

Integers never become floats on their way: of 54 bits and more these would be others.
"""

from __future__ import annotations

import logging
import math
import operator
from fractions import Fraction
from numbers import Real
from typing import Any

import numpy as np

from efl.errors import ConfigError, DataError

_log = logging.getLogger("efl")
MOST_BITS = 62  # of an encoded number, so that it is an int64


def encode(
    values: Any,
    scale_bits: int,
    limit: float,
    clip: bool = False,
    who: str = "encrypt",
    remedy: str = "scale them, give a larger limit, or clip=True",
) -> np.ndarray:
    """Rounds numbers to multiples of ``2**-scale_bits``. Integers are exact.

    Args:
      values: Real numbers; also an object array of Python's integers.
      scale_bits: Of the fraction, at least 0.
      limit: The largest magnitude.
      clip: What is larger is clipped, counted and logged; otherwise it is refused.
      who: For messages.
      remedy: What to do where values are larger than the limit, for messages.

    Returns:
      int64, of the shape of ``values``; none is larger than ``bound_of(limit, scale_bits)`` in magnitude.

    Raises:
      DataError: A number is not finite, or larger than ``limit``.
      ConfigError: The numbers would be of more than 62 bits, or are none; or an argument is of another type.
    """
    held = numbers_of(values, who)
    scale_bits, limit = whole(scale_bits, "scale_bits", who), float_of(limit, who)
    if not isinstance(clip, (bool, np.bool_)):
        raise ConfigError(f"{who}: clip={clip!r}: expected True or False")
    if not (scale_bits >= 0 and limit > 0 and math.ceil(limit).bit_length() + scale_bits <= MOST_BITS):
        raise ConfigError(
            f"{who}: scale_bits={scale_bits} with limit={limit:g}: expected at most {MOST_BITS} bits together, neither "
            "negative"
        )
    if held.dtype.kind == "f":
        if not np.isfinite(held).all():
            raise DataError(f"{who}: {np.count_nonzero(~np.isfinite(held))} of {held.size} values are NaN or infinite")
        held = held.astype(np.float64)
        _told(np.abs(held) > limit, limit, clip, who, remedy)
        return np.asarray(np.rint(np.clip(held, -limit, limit) * 2.0**scale_bits)).astype(np.int64)
    most = math.floor(limit)  # an integer is larger than the limit where it is larger than this
    above = np.asarray(held > most, bool)
    below = np.asarray(held < -most, bool)
    _told(above | below, limit, clip, who, remedy)
    edge = math.floor(Fraction(limit) * (1 << scale_bits))
    kept = np.array(held)
    kept[above | below] = 0
    scaled = kept.astype(np.int64) << scale_bits
    return np.where(above, edge, np.where(below, -edge, scaled)).astype(np.int64)


def bound_of(limit: float, scale_bits: int) -> int:
    """The largest magnitude of the integers that numbers up to ``limit`` become."""
    return math.ceil(Fraction(limit) * (1 << scale_bits))


def numbers_of(values: Any, who: str) -> np.ndarray:
    """An array of real numbers as numpy has them, or of Python's integers (``object``) where it has none of such size.

    Args:
      values: Numbers.
      who: For messages.

    Raises:
      ConfigError: They are none.
    """
    try:
        held = np.asarray(values)
    except ValueError:
        raise ConfigError(f"{who}: values of no one shape: expected an array of real numbers") from None
    if held.dtype.kind in "biu" or (held.dtype.kind == "f" and not isinstance(values, (list, tuple))):
        return held
    # Of a list with integers from 2**63 on and negative ones numpy makes floats.
    exact = _whole(np.array(values, object)) if held.dtype.kind in "fO" else None
    if exact is not None and (held.size or held.dtype.kind == "O"):
        return exact
    if held.dtype.kind == "f":
        return held
    raise ConfigError(f"{who}: values of dtype {held.dtype}: expected real numbers: an array of floats, or of integers")


def integers_of(values: Any, who: str) -> np.ndarray | None:
    """Anything of integers as Python's integers, exactly.

    Args:
      values: numpy's integers of any type, truth values, Python's integers of any size, lists and object arrays of
        these.
      who: For messages.

    Returns:
      ``object``; None where something is no integer.
    """
    try:
        held = numbers_of(values, who)
    except ConfigError:
        return None
    return None if held.dtype.kind == "f" else _whole(held.astype(object))


def whole(value: Any, name: str, who: str) -> int:
    """An argument that is an integer.

    Args:
      value: Of the argument.
      name: Of the argument.
      who: Has the argument.

    Raises:
      ConfigError: It is none.
    """
    if isinstance(value, (bool, np.bool_)):
        raise ConfigError(f"{who}: {name}={value!r}: expected an integer")
    try:
        return operator.index(value)
    except TypeError:
        raise ConfigError(f"{who}: {name}={value!r}: expected an integer") from None


def float_of(limit: Any, who: str) -> float:
    """A limit as a float, from which everything else follows; at least as large as what was given.

    Args:
      limit: A real number.
      who: For messages.

    Raises:
      ConfigError: It is none, or not finite.
    """
    given = int(limit) if isinstance(limit, np.integer) else limit  # Python compares integers and floats exactly
    try:
        made = float(given) if isinstance(given, Real) else math.nan
    except OverflowError:
        made = math.inf
    if not math.isfinite(made):
        raise ConfigError(f"{who}: limit={limit!r}: expected the largest magnitude of a number, which is finite")
    return made if made >= given else math.nextafter(made, math.inf)


def decode(integers: np.ndarray, scale_bits: int) -> np.ndarray:
    """The numbers that integers at a scale stand for.

    Args:
      integers: Python integers, ``object``.
      scale_bits: Of the fraction.

    Returns:
      float64; with ``scale_bits=0`` int64 where all fit, else ``object``.

    Raises:
      DataError: A number is too large for a float64.
    """
    if scale_bits:
        # Divided as Python does, which rounds once whatever the sizes.
        try:
            return np.array([int(each) / (1 << scale_bits) for each in integers.ravel()]).reshape(integers.shape)
        except OverflowError:
            raise DataError(
                "decrypt: a number is larger than a float64 can be: decrypt(exact=True) gives the integers, multiples "
                f"of 2**-{scale_bits}"
            ) from None
    fits = all(-(1 << 63) <= int(each) < 1 << 63 for each in integers.ravel())
    return integers.astype(np.int64) if fits else integers


def _told(beyond: np.ndarray, limit: float, clip: bool, who: str, remedy: str) -> None:
    count = np.count_nonzero(beyond)
    if count:
        what = f"{who}: {count} of {beyond.size} values are larger than {limit:g} in magnitude"
        if not clip:
            raise DataError(f"{what}: {remedy}")
        _log.warning("%s, and were clipped", what)


def _whole(objects: np.ndarray) -> np.ndarray | None:
    """Objects as Python's integers; None where one is none."""
    made = np.empty(objects.size, object)
    for position, each in enumerate(objects.ravel()):
        if isinstance(each, (bool, np.bool_)):
            made[position] = int(each)
            continue
        try:
            made[position] = operator.index(each)
        except TypeError:
            return None
    return made.reshape(objects.shape)
