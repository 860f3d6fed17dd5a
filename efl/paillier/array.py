"""Arrays of encrypted numbers, and what can be computed with them without the private key.

    encrypted = public.encrypt(x)                                     # one number in a ciphertext
    packed = public.encrypt(x, limit=8.0, pack_axis=0, headroom_bits=24)   # many along the batch
    private.decrypt(packed.matmul(weights, scale_bits=12) + bias)     # x @ weights + bias

Numbers are integers at a scale; an array knows the largest magnitude that its numbers can have reached, and refuses
what would make them leave their place before it is computed: afterwards it could not be seen. Multipliers are integers;
floats say at which scale they become integers (``times``, ``matmul``).

What was computed leaves (``to_bytes``, ``to_phe``) under fresh masks, and with a layout that follows from what is
public. Whoever holds the private key learns of it

* the numbers, which are often enough to find what they were computed from: hide them where they must not be known;
* their shape, their scale, along which axis they are packed and in how wide slots, that they were computed, and whether
  from phe's numbers. The scale adds up the ``scale_bits`` of all factors;
* ``limit``, where ``to_bytes`` is given one;
* how long it took, which depends on the multipliers.

It learns neither the other operands nor how large they can be: an array's own bound, and the bits of its masks, follow
from these and stay here. An array that was only encrypted leaves with the ``limit`` that ``encrypt`` was given.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from gmpy2 import invert, mpz, powmod

from efl.errors import ConfigError
from efl.paillier import residues
from efl.paillier.encoding import bound_of, encode, float_of, integers_of, whole
from efl.paillier.layout import Layout, check_room, most_of, objects, packed_of, room_of
from efl.paillier.masks import Masks, bits_to_hide
from efl.paillier.multiexp import multiexp

if TYPE_CHECKING:
    from efl.paillier.public_key import PublicKey

_FACTOR_BITS = 62  # of an integer in a matrix: with its offset it is an int64


class EncryptedArray:
    """An array of encrypted numbers. Made by ``PublicKey.encrypt``.

    Attributes:
      public: The key.
      layout: Shape, scale, bound, and how numbers are packed.
    """

    __array_ufunc__ = None  # numpy leaves operators to this class
    __hash__ = None  # type: ignore[assignment]  # what cannot be compared has no hash

    def __init__(self, public: PublicKey, layout: Layout, cells: np.ndarray) -> None:
        self.public, self.layout, self._cells = public, layout, cells
        check_room(public, layout)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.layout.shape

    @property
    def scale_bits(self) -> int:
        """Numbers are multiples of ``2**-scale_bits``."""
        return self.layout.scale_bits

    def __repr__(self) -> str:
        return f"<EncryptedArray {list(self.shape)} of {self._cells.size} ciphertexts, scale 2**-{self.scale_bits}>"

    def __len__(self) -> int:
        return self.shape[0]

    def _refuse(self, *unused: object) -> Any:
        raise TypeError("encrypted numbers have no truth, no order and no elements to look at: decrypt them first")

    __bool__ = __iter__ = __eq__ = __ne__ = __lt__ = __gt__ = __array__ = __float__ = _refuse

    # ---- operators

    def __add__(self, other: Any) -> EncryptedArray:
        """The sum with another array of the same shape, key, scale and packing, or with numbers at this scale.

        Numbers are rounded to multiples of ``2**-scale_bits`` and broadcast to this shape.

        Raises:
          ConfigError: They do not go together, or the sum would not fit.
        """
        return self._plus(other) if isinstance(other, EncryptedArray) else self._plus_plain(other)

    __radd__ = __add__

    def __neg__(self) -> EncryptedArray:
        """Minus this."""
        return self * -1

    def __sub__(self, other: Any) -> EncryptedArray:
        """The difference; see ``+``."""
        return self._plus(-other) if isinstance(other, EncryptedArray) else self._plus_plain(other, minus=True)

    def __rsub__(self, other: Any) -> EncryptedArray:
        """The difference; see ``+``."""
        return -self + other

    def __mul__(self, other: Any) -> EncryptedArray:
        """The product with integers: one, or an array that is broadcast to this shape.

        Raises:
          TypeError: They are floats, whose scale ``times`` asks for.
          ConfigError: Their shape does not go with it, they differ along the packed axis, or the product would not fit.
        """
        factors = integers_of(other, "*")
        if factors is None:
            raise TypeError(
                "an EncryptedArray is multiplied by integers; of floats say their scale: times(x, scale_bits=…)"
            )
        return self._times(factors, 0)

    __rmul__ = __mul__

    def times(self, other: Any, *, scale_bits: int) -> EncryptedArray:
        """The product with floats, rounded to multiples of ``2**-scale_bits``. Scales add up.

        Raises:
          ConfigError: As for ``*``.
        """
        scale_bits = whole(scale_bits, "scale_bits", "times")
        return self._times(encode(other, scale_bits, room_of(scale_bits), who="times").astype(object), scale_bits)

    def __matmul__(self, matrix: Any) -> EncryptedArray:
        """The product with an integer matrix: ``[B, d] @ [d, u]``. See ``matmul``.

        Raises:
          TypeError: It is of floats.
          ConfigError: As for ``matmul``; or an integer is not below 2**62 in magnitude.
        """
        held = integers_of(matrix, "@")
        if held is None:
            raise TypeError(
                "an EncryptedArray is multiplied by integers; of floats say their scale: matmul(m, scale_bits=…)"
            )
        return self._matmul(held, 0)

    def matmul(self, matrix: Any, *, scale_bits: int) -> EncryptedArray:
        """The product with a matrix of floats, rounded to multiples of ``2**-scale_bits``. Scales add up.

        Args:
          matrix: ``[d, u]``; this array is ``[B, d]``, not packed along d.
          scale_bits: Of the matrix.

        Returns:
          ``[B, u]``, packed as this one.

        Raises:
          ConfigError: Shapes or packing do not allow it, or the product would not fit.
        """
        scale_bits = whole(scale_bits, "scale_bits", "matmul")
        return self._matmul(encode(matrix, scale_bits, room_of(scale_bits), who="matmul").astype(object), scale_bits)

    def sum(self, axis: int = 0) -> EncryptedArray:
        """The sum along an axis along which it is not packed.

        Raises:
          ConfigError: It is packed along it, or has no such axis.
        """
        axis, layout, square = self._axis(axis, "sum"), self.layout, self.public.square
        terms, pack = self.shape[axis], layout.pack_axis
        made = self._computed(
            shape=layout.shape[:axis] + layout.shape[axis + 1 :],
            pack_axis=pack - 1 if pack is not None and pack > axis else pack,
            bound=layout.bound * terms,
            terms=terms,
        )
        moved = np.moveaxis(self._cells, axis, -1)
        total = np.empty(moved.shape[:-1], object)
        for index in np.ndindex(total.shape):
            product = mpz(1)
            for cell in moved[index]:
                product = product * cell % square
            total[index] = product
        return EncryptedArray(self.public, made, total)

    def rescale(self, scale_bits: int) -> EncryptedArray:
        """The same numbers at a finer scale.

        Raises:
          ConfigError: It is a coarser one.
        """
        more = whole(scale_bits, "scale_bits", "rescale") - self.scale_bits
        if more < 0:
            raise ConfigError(f"rescale({scale_bits}): expected at least the scale that it has, {self.scale_bits} bits")
        return self._times(objects([1 << more], ()), more) if more else self

    # ---- what leaves

    def masked(self, *, limit: float | None = None) -> EncryptedArray:
        """The same numbers as they may leave: under fresh masks and with a layout that hide how they were computed.

        What is left to compute is computed before: without a limit there is no room afterwards.

        Args:
          limit: See ``to_bytes``.

        Raises:
          ConfigError: As for ``to_bytes``.
        """
        public, layout = self.public, self.layout
        n, square = public.n, public.square
        bound = self._leaving(limit)
        bits = layout.mask_bits + (public.masks.hiding_bits if layout.computed else 0)
        # This key's own masks are no part of phe's, and would hide a part of what these were multiplied by.
        masks = Masks(n, None, public.bits) if layout.foreign else public.masks
        fresh = [cell * masks.draw(bits).finished(n, square) % square for cell in self._cells.ravel()]
        # Masks repeat after as many bits as n has, so this is true whatever the cells were multiplied by.
        leaves = replace(layout, bound=bound, mask_bits=public.bits, computed=False)
        return EncryptedArray(public, leaves, objects(fresh, self._cells.shape))

    def to_bytes(self, *, limit: float | None = None) -> tuple[np.ndarray, Layout]:
        """The ciphertexts as they may leave: masked, if they were computed.

        The layout that leaves is of the array's ``shape``, ``scale_bits``, ``pack_axis``, ``slot_bits`` and
        ``foreign``. Its ``bound`` is that of ``limit``; without one it is, of an array that was only encrypted, that of
        ``encrypt``'s limit, and of one that was computed the most that its ciphertexts can hold, with which its
        receiver can decrypt and not compute: there would be no room for what comes of it. ``mask_bits`` is, of an array
        that was computed, the most that there are. So the layout tells nothing of what it was computed with.

        Args:
          limit: The largest magnitude of the numbers, as the receiver may know it: choose it by what is public, and not
            by the numbers. The receiver can compute with them as far as that leaves room.

        Returns:
          (uint8 ``[count, 2 * bytes of n]``, layout); both go to ``PublicKey.from_bytes``.

        Raises:
          ConfigError: The numbers could be larger than ``limit``, or it is more than ciphertexts can hold.
        """
        bound = self._leaving(limit)
        ready = self.masked(limit=limit) if self.layout.computed else self
        rows = residues.to_rows(ready._cells.ravel(), residues.width_of(int(self.public.square)))
        return rows, replace(ready.layout, bound=bound)

    def to_phe(self) -> list[Any]:
        """phe's ``EncryptedNumber`` for each number, in C order.

        Raises:
          ConfigError: It is packed, which phe does not know, or its numbers may be in what phe takes for an overflow.
        """
        import phe

        if self.layout.pack_axis is not None:
            raise ConfigError("to_phe: phe has one number in each ciphertext; encrypt without pack_axis")
        ready = self.rescale(self.scale_bits + -self.scale_bits % 4)  # phe's base is 16
        if ready.layout.bound >= self.public.n // 3:
            raise ConfigError("to_phe: the numbers may be of n/3 and more, which phe takes for an overflow")
        key = phe.PaillierPublicKey(int(self.public.n))
        made = []
        for cell in (ready.masked() if ready.layout.computed else ready)._cells.ravel():
            made.append(phe.EncryptedNumber(key, int(cell), -ready.scale_bits // 4))
            made[-1]._EncryptedNumber__is_obfuscated = True
        return made

    # ---- private

    def _computed(
        self,
        *,
        bound: int,
        multiplier_bits: int = 0,
        terms: int = 1,
        scale_bits: int = 0,
        shape: tuple[int, ...] | None = None,
        pack_axis: int | None = None,
        mask_bits: int = 0,
        foreign: bool = False,
    ) -> Layout:
        """The layout of what is about to be computed, if it fits."""
        layout, bits = self.layout, self.public.bits
        made = Layout(
            layout.shape if shape is None else shape,
            layout.scale_bits + scale_bits,
            bound,
            layout.pack_axis if shape is None else pack_axis,
            layout.slot_bits,
            bits_to_hide(max(layout.mask_bits, mask_bits), multiplier_bits, terms, bits),
            computed=True,
            foreign=layout.foreign or foreign,
        )
        check_room(self.public, made)
        return made

    def _leaving(self, limit: float | None) -> int:
        """The bound that leaves."""
        layout, most = self.layout, most_of(self.public, self.layout)
        if limit is None:
            return most if layout.computed else layout.bound
        bound = bound_of(float_of(limit, "to_bytes"), layout.scale_bits)
        if bound < layout.bound:
            raise ConfigError(
                f"to_bytes: the numbers could be larger than limit={limit:g}: they are below "
                f"2**{layout.bound.bit_length() - layout.scale_bits}; give a larger limit, or none"
            )
        if bound > most:
            raise ConfigError(
                f"to_bytes: limit={limit:g} is more than the ciphertexts can hold, numbers below "
                f"2**{most.bit_length() - layout.scale_bits}; give a smaller limit, or none"
            )
        return bound

    def _plus(self, other: EncryptedArray) -> EncryptedArray:
        mine, its = self.layout, other.layout
        same = [
            ("key", self.public.fingerprint, other.public.fingerprint),
            ("shape", mine.shape, its.shape),
            ("scale_bits", mine.scale_bits, its.scale_bits),
            ("packing", (mine.pack_axis, mine.slot_bits), (its.pack_axis, its.slot_bits)),
        ]
        for what, one, two in same:
            if one != two:
                raise ConfigError(f"sum of two encrypted arrays of different {what}: {one} and {two}")
        made = self._computed(bound=mine.bound + its.bound, terms=2, mask_bits=its.mask_bits, foreign=its.foreign)
        return EncryptedArray(self.public, made, self._cells * other._cells % self.public.square)

    def _plus_plain(self, other: Any, minus: bool = False) -> EncryptedArray:
        layout, n = self.layout, self.public.n
        encoded = encode(other, layout.scale_bits, room_of(layout.scale_bits), who="-" if minus else "+")
        integers = _spread(-encoded if minus else encoded, layout.shape, "sum")
        made = self._computed(bound=layout.bound + int(np.abs(integers).max(initial=0)))
        packed = packed_of(integers, layout.pack_axis, layout.slots(self.public.bits))
        return EncryptedArray(self.public, made, self._cells * (1 + n * (packed % n)) % self.public.square)

    def _times(self, factors: np.ndarray, scale_bits: int) -> EncryptedArray:
        """The product with Python's integers of any size, at a scale."""
        layout, square = self.layout, self.public.square
        _spread(factors, layout.shape, "product")
        factors = factors.reshape((1,) * (len(layout.shape) - factors.ndim) + factors.shape)
        if layout.pack_axis is not None and factors.shape[layout.pack_axis] != 1:
            raise ConfigError(
                f"product: the numbers along axis {layout.pack_axis} are packed, so they have one factor; encrypt "
                "without pack_axis, or along another axis"
            )
        most = _largest(factors)
        made = self._computed(bound=layout.bound * most, multiplier_bits=most.bit_length(), scale_bits=scale_bits)
        spread = np.broadcast_to(factors, self._cells.shape)
        cells = [powmod(cell, each, square) for cell, each in zip(self._cells.ravel(), spread.ravel())]
        return EncryptedArray(self.public, made, objects(cells, self._cells.shape))

    def _matmul(self, matrix: np.ndarray, scale_bits: int) -> EncryptedArray:
        """The product with a matrix of Python's integers at a scale."""
        layout, n, square = self.layout, self.public.n, self.public.square
        if len(layout.shape) != 2 or matrix.ndim != 2 or layout.shape[1] != matrix.shape[0]:
            raise ConfigError(
                f"matrix product of shapes {list(layout.shape)} and {list(matrix.shape)}: expected [B, d] and [d, u]"
            )
        if layout.pack_axis == 1:
            raise ConfigError(
                "matrix product: the numbers along axis 1 are packed, and cannot be added up; pack along axis 0"
            )
        most = _largest(matrix)
        if most.bit_length() > _FACTOR_BITS:
            raise ConfigError(
                f"matrix product: an integer of {most.bit_length()} bits: expected all below 2**{_FACTOR_BITS} in "
                "magnitude; multiply by a smaller matrix, and the product by what is missing"
            )
        bits = most.bit_length() + 1
        made = self._computed(
            bound=layout.bound * int(np.abs(matrix).sum(0).max(initial=0)),
            multiplier_bits=bits,
            terms=2 * matrix.shape[0],
            scale_bits=scale_bits,
            shape=(layout.shape[0], matrix.shape[1]),
            pack_axis=layout.pack_axis,
        )
        offset = 1 << (bits - 1)
        exponents = (matrix.astype(np.int64) + offset).astype(np.uint64)
        cells = []
        for bases in self._cells:
            common = mpz(1)
            for base in bases:
                common = common * base % square
            without = invert(powmod(common, offset, square), square)
            products = multiexp(list(bases), exponents, bits, n, self.public.masks.draw().finished(n, square))
            cells += [product.finished(n, square) * without % square for product in products]
        return EncryptedArray(self.public, made, objects(cells, (len(self._cells), matrix.shape[1])))

    def _axis(self, axis: int, what: str) -> int:
        axes = len(self.shape)
        if axis is None:
            raise ConfigError(
                f"{what}: axis=None: expected one axis; of several, one after another: .{what}(-1).{what}(-1)"
            )
        axis = whole(axis, "axis", what)
        if not -axes <= axis < axes:
            raise ConfigError(f"{what}: no axis {axis} in shape {list(self.shape)}")
        if axis % axes == self.layout.pack_axis:
            raise ConfigError(f"{what}: the numbers along axis {axis} are packed, and cannot be added up")
        return axis % axes


def _spread(values: np.ndarray, shape: tuple[int, ...], what: str) -> np.ndarray:
    try:
        return np.broadcast_to(values, shape)
    except ValueError:
        raise ConfigError(
            f"{what}: an encrypted array of shape {list(shape)} and numbers of shape {list(np.shape(values))}: "
            "expected a shape that broadcasts to the array's"
        ) from None


def _largest(integers: np.ndarray) -> int:
    return max((abs(each) for each in integers.ravel()), default=0)
