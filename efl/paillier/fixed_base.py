"""Powers of one base: a table of the powers for every window of the exponent (Brickell et al., EUROCRYPT '92).

    g^e = Π g^(2^(w·i)·eᵢ), eᵢ the i-th window of w bits

needs |e|/w multiplications and no squaring. With the elements split (``factored``) an exponent of 1024 bits takes 128
products of 2|n| by |n| bits for windows of 8 bits. Windows of zeros are multiplied too: how long a power takes follows
from ``bits`` alone.
"""

from __future__ import annotations

from operator import getitem

import gmpy2
from gmpy2 import mpz

from efl.paillier.factored import ONE, Product, Split


class FixedBase:
    """The table of one base.

    Args:
      base: An element of Z*_{n²}.
      n: The modulus's root.
      bits: The longest exponent.
      window: Bits of a window: 8 take 0.2 s and some 20 MiB at 2048 bits, 9 twice and 10 four times as much; a power
        takes a tenth less with each.
    """

    def __init__(self, base: mpz, n: mpz, bits: int, window: int = 9) -> None:
        self.bits, self._window, self._square = bits, window, n * n
        self._lows: list[list[mpz]] = []
        self._tails: list[list[mpz]] = []
        for _ in range(-(-bits // window)):
            first = Split.of(base, n)
            powers = [ONE, first]
            for _ in range(2, 1 << window):
                powers.append(powers[-1].times(first, n))
            self._lows.append([power.low for power in powers])
            self._tails.append([power.tail for power in powers])
            last = powers[-1].times(first, n)  # base^(2^window)
            base = Product(last.low, last.tail).finished(n, self._square)

    def power(self, exponent: int, bits: int) -> Product:
        """``base ** exponent``.

        Args:
          exponent: At least 0.
          bits: Of the longest exponent of its kind, at most the table's.

        Raises:
          ValueError: The table is too short: what it lacks would be left out, and a mask be too weak.
        """
        if bits > self.bits or exponent >> bits:
            raise ValueError(f"an exponent of {max(bits, int(exponent).bit_length())} bits, a table of {self.bits}")
        square, head = self._square, mpz(1)
        digits = gmpy2.unpack(mpz(exponent), self._window)
        digits += [0] * (-(-bits // self._window) - len(digits))
        for low in map(getitem, self._lows, digits):  # as many as there are digits: the table may be longer
            head = head * low % square
        return Product(head, sum(map(getitem, self._tails, digits), mpz(0)))
