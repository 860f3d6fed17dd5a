"""Elements of Z*_{n²} as c = l·(1 + n·m): a factor 1 + n·m is free, for of such the m only add.

Where many elements are multiplied, each is brought to l < n once. A running product then costs one multiplication of
2|n| by |n| bits and one reduction for each factor, and an addition.
"""

from __future__ import annotations

from typing import NamedTuple

from gmpy2 import f_divmod, invert, mpz


class Product(NamedTuple):
    """A product of elements that is not finished: its value is ``head * (1 + n * tail)`` mod n².

    Attributes:
      head: Below n².
      tail: Any integer; counts mod n.
    """

    head: mpz
    tail: mpz

    def finished(self, n: mpz, square: mpz, plaintext: mpz | int = 0) -> mpz:
        """The element itself, times an encryption of ``plaintext`` without a mask."""
        return self.head * (1 + n * ((self.tail + plaintext) % n)) % square

    def times(self, other: Product, square: mpz) -> Product:
        """The product of two."""
        return Product(self.head * other.head % square, self.tail + other.tail)


class Split(NamedTuple):
    """An element in two halves, with what it takes to multiply it to others and keep them so.

    Attributes:
      low: l, below n.
      tail: m, below n.
      inverse: Of l, mod n.
    """

    low: mpz
    tail: mpz
    inverse: mpz

    @classmethod
    def of(cls, element: mpz, n: mpz) -> Split:
        """Splits an element that is coprime to n."""
        high, low = f_divmod(element, n)
        inverse = invert(low, n)
        return cls(low, high * inverse % n, inverse)

    def times(self, other: Split, n: mpz) -> Split:
        """The product of two: l·l' = h·n + x, and x + h·n = x·(1 + n·h/x)."""
        high, low = f_divmod(self.low * other.low, n)
        inverse = self.inverse * other.inverse % n
        return Split(low, (self.tail + other.tail + high * inverse) % n, inverse)


ONE = Split(mpz(1), mpz(0), mpz(1))
