"""Powers with a secret exponent, as decryption takes them.

By the OpenSSL that Python itself is linked to, where it is to be found: it takes the same time and touches the same
memory whatever the base and the exponent are (``BN_mod_exp_mont_consttime``), and less of it than gmpy2, which
computes where there is none. Both let other Python threads run.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Sequence
from typing import Any

from gmpy2 import mpz, powmod_base_list


class SecretExponent:
    """Raises numbers to one secret power.

    Args:
      exponent: The power, at least 1.
      modulus: Odd.
    """

    def __init__(self, exponent: mpz, modulus: mpz) -> None:
        self._exponent, self._modulus = exponent, modulus
        library = openssl()
        self._held = None if library is None else _Held(library, int(exponent), int(modulus))

    def powers(self, bases: Sequence[mpz]) -> list[mpz]:
        """base ** exponent mod the modulus, of each.

        Args:
          bases: At least 0.

        Raises:
          MemoryError: There is none left.
        """
        reduced = [base % self._modulus for base in bases]
        if self._held is None:
            return powmod_base_list(reduced, self._exponent, self._modulus)
        return self._held.powers(reduced)


@functools.lru_cache(maxsize=1)
def openssl() -> ctypes.CDLL | None:
    """The OpenSSL of this Python; None where it keeps its functions to itself."""
    try:
        import _hashlib  # the module of Python that is linked to it; not every Python has one

        library = ctypes.CDLL(getattr(_hashlib, "__file__", None))
        for name, result, *arguments in _FUNCTIONS:
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (ImportError, OSError, AttributeError):
        return None
    return library


class _Held:
    """The numbers of a ``SecretExponent`` as OpenSSL has them; any number of threads may use them."""

    def __init__(self, library: ctypes.CDLL, exponent: int, modulus: int) -> None:
        self._library, self._width = library, (modulus.bit_length() + 7) // 8
        numbers: list[int] = []
        contexts: list[int] = []
        # Not at the program's end, when a thread may still be computing.
        weakref.finalize(self, _free, library, numbers, contexts).atexit = False
        for number in (exponent, modulus):
            numbers.append(_made(library.BN_bin2bn(*_bytes_of(number), None)))
        self._exponent, self._modulus = numbers
        contexts.append(_made(library.BN_MONT_CTX_new()))
        self._montgomery = contexts[0]
        with _Scratch(library) as scratch:
            _made(library.BN_MONT_CTX_set(self._montgomery, self._modulus, scratch.context))

    def powers(self, bases: Sequence[mpz]) -> list[mpz]:
        library, width = self._library, self._width
        found, buffer = [], ctypes.create_string_buffer(width)
        with _Scratch(library) as scratch:
            x, y, context = scratch.base, scratch.power, scratch.context
            for base in bases:
                _made(library.BN_bin2bn(int(base).to_bytes(width, "big"), width, x))
                _made(library.BN_mod_exp_mont_consttime(y, x, self._exponent, self._modulus, context, self._montgomery))
                _made(library.BN_bn2binpad(y, buffer, width) == width)
                found.append(mpz(int.from_bytes(buffer.raw, "big")))
        return found


class _Scratch:
    """What one thread computes in; overwritten when it is left."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def __enter__(self) -> _Scratch:
        self.context = _made(self._library.BN_CTX_new())
        self.base, self.power = _made(self._library.BN_new()), _made(self._library.BN_new())
        return self

    def __exit__(self, *error: object) -> None:
        self._library.BN_clear_free(self.base)
        self._library.BN_clear_free(self.power)
        self._library.BN_CTX_free(self.context)


def _made(result: Any) -> Any:
    if not result:
        raise MemoryError("OpenSSL has no memory left for a power")
    return result


def _bytes_of(number: int) -> tuple[bytes, int]:
    size = (number.bit_length() + 7) // 8
    return number.to_bytes(size, "big"), size


def _free(library: ctypes.CDLL, numbers: Sequence[int], contexts: Sequence[int]) -> None:
    for number in numbers:
        library.BN_clear_free(number)
    for context in contexts:
        library.BN_MONT_CTX_free(context)


_NUMBER = ctypes.c_void_p
_FUNCTIONS: tuple[tuple[Any, ...], ...] = (
    ("BN_new", _NUMBER),
    ("BN_clear_free", None, _NUMBER),
    ("BN_bin2bn", _NUMBER, ctypes.c_char_p, ctypes.c_int, _NUMBER),
    ("BN_bn2binpad", ctypes.c_int, _NUMBER, ctypes.c_char_p, ctypes.c_int),
    ("BN_CTX_new", _NUMBER),
    ("BN_CTX_free", None, _NUMBER),
    ("BN_MONT_CTX_new", _NUMBER),
    ("BN_MONT_CTX_set", ctypes.c_int, _NUMBER, _NUMBER, _NUMBER),
    ("BN_MONT_CTX_free", None, _NUMBER),
    ("BN_mod_exp_mont_consttime", ctypes.c_int, *[_NUMBER] * 6),
)
