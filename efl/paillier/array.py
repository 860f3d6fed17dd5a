"""Arrays of encrypted numbers, and what can be computed with them without the private key.

    encrypted = public.encrypt(x)                                     # one number in a ciphertext
    packed = public.encrypt(x, limit=8.0, pack_axis=0, headroom_bits=24)   # many along the batch
    private.decrypt(packed.matmul(weights, scale_bits=12) + bias)     # x @ weights + bias

Numbers are integers at a scale; an array knows the largest magnitude that its numbers can have reached, and refuses
what would make them leave their place before it is computed: afterwards it could not be seen. Multipliers are integers;
floats say at which scale they become integers (``times``, ``matmul``). What was computed is masked anew whenever it is
serialised, so that whoever holds the private key learns the numbers and nothing of how they were made. (Which shape,
scale and bound they have, and how long it took, is no secret.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from gmpy2 import invert, mpz, powmod

from efl.errors import ConfigError, DataError
from efl.paillier import residues
from efl.paillier.decryption import decrypted, processors
from efl.paillier.encoding import MOST_BITS, decode, encode
from efl.paillier.masks import bits_to_hide
from efl.paillier.multiexp import multiexp
from efl.paillier.slots import Slots

if TYPE_CHECKING:
    from efl.paillier.keys import PrivateKey, PublicKey

_SCALE_BITS = 16
_LIMIT = 2.0**32


@dataclass(frozen=True)
class Layout:
    """What a receiver has to know of an array, beside the key. Tells nothing of its values.

    Attributes:
      shape: Of the array.
      scale_bits: Numbers are multiples of ``2**-scale_bits``.
      bound: The largest magnitude of their integers.
      pack_axis: The axis along which ciphertexts hold several numbers; None: each holds one.
      slot_bits: Bits for each of several.
      mask_bits: Of the longest exponent that masks one.
      computed: Whether it was computed, and not masked since.
    """

    shape: tuple[int, ...]
    scale_bits: int
    bound: int
    pack_axis: int | None
    slot_bits: int
    mask_bits: int
    computed: bool = False

    def slots(self, key_bits: int) -> Slots | None:
        """How numbers lie along ``pack_axis``."""
        return None if self.pack_axis is None else Slots.fit(self.shape[self.pack_axis], self.slot_bits, key_bits)

    def cells(self, key_bits: int) -> tuple[int, ...]:
        """The shape of the ciphertexts."""
        slots = self.slots(key_bits)
        if slots is None or self.pack_axis is None:
            return self.shape
        return (*self.shape[: self.pack_axis], slots.groups, *self.shape[self.pack_axis + 1 :])


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
        slots = layout.slots(public.bits)
        # One bit is left free: what wanders out of its place is met there.
        most = (int(public.n) - 1) // 2 if slots is None else slots.limit // 2 - 1
        if layout.bound > most:
            room = "one ciphertext" if slots is None else f"slots of {slots.bits} bits"
            raise ConfigError(
                f"encrypted numbers could reach {layout.bound.bit_length()} bits, which {room} cannot hold: encrypt "
                "with more headroom_bits, with a smaller limit or scale_bits, or multiply by smaller numbers"
            )

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
        return self + (-other if isinstance(other, EncryptedArray) else np.negative(other))

    def __rsub__(self, other: Any) -> EncryptedArray:
        """The difference; see ``+``."""
        return -self + other

    def __mul__(self, other: Any) -> EncryptedArray:
        """The product with integers: one, or an array that is broadcast to this shape.

        Raises:
          TypeError: They are floats, whose scale ``times`` asks for.
          ConfigError: They differ along the packed axis, or the product would not fit.
        """
        factors = np.asarray(other)
        if factors.dtype.kind not in "biu":
            raise TypeError(
                "an EncryptedArray is multiplied by integers; of floats say their scale: times(x, scale_bits=…)"
            )
        return self._times(factors.astype(np.int64), 0)

    __rmul__ = __mul__

    def times(self, other: Any, *, scale_bits: int) -> EncryptedArray:
        """The product with floats, rounded to multiples of ``2**-scale_bits``. Scales add up.

        Raises:
          ConfigError: As for ``*``.
        """
        return self._times(encode(other, scale_bits, _room(scale_bits), who="times"), scale_bits)

    def __matmul__(self, matrix: Any) -> EncryptedArray:
        """The product with an integer matrix: ``[B, d] @ [d, u]``. See ``matmul``."""
        held = np.asarray(matrix)
        if held.dtype.kind not in "biu":
            raise TypeError(
                "an EncryptedArray is multiplied by integers; of floats say their scale: matmul(m, scale_bits=…)"
            )
        return self._matmul(held.astype(np.int64), 0)

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
        return self._matmul(encode(matrix, scale_bits, _room(scale_bits), who="matmul"), scale_bits)

    def sum(self, axis: int = 0) -> EncryptedArray:
        """The sum along an axis along which it is not packed.

        Raises:
          ConfigError: It is packed along it, or has no such axis.
        """
        axis, layout, square = self._axis(axis, "sum"), self.layout, self.public.square
        moved = np.moveaxis(self._cells, axis, -1)
        total = np.empty(moved.shape[:-1], object)
        for index in np.ndindex(total.shape):
            product = mpz(1)
            for cell in moved[index]:
                product = product * cell % square
            total[index] = product
        terms = self.shape[axis]
        shape = layout.shape[:axis] + layout.shape[axis + 1 :]
        pack = layout.pack_axis
        pack = pack - 1 if pack is not None and pack > axis else pack
        return self._made(total, shape=shape, pack_axis=pack, bound=layout.bound * terms, terms=terms)

    def rescale(self, scale_bits: int) -> EncryptedArray:
        """The same numbers at a finer scale.

        Raises:
          ConfigError: It is a coarser one.
        """
        more = scale_bits - self.scale_bits
        if more < 0:
            raise ConfigError(f"rescale({scale_bits}): expected at least the scale that it has, {self.scale_bits} bits")
        return self._times(np.array(1 << more), more) if more else self

    # ---- what leaves

    def masked(self) -> EncryptedArray:
        """The same numbers under fresh masks, which hide how they were computed."""
        n, square, masks = self.public.n, self.public.square, self.public.masks
        bits = self.layout.mask_bits + (masks.hiding_bits if self.layout.computed else 0)
        fresh = [cell * masks.draw(bits).finished(n, square) % square for cell in self._cells.ravel()]
        layout = replace(self.layout, mask_bits=max(bits, masks.fresh_bits), computed=False)
        return EncryptedArray(self.public, layout, _objects(fresh, self._cells.shape))

    def to_bytes(self) -> tuple[np.ndarray, Layout]:
        """The ciphertexts as they may leave: masked, if they were computed.

        Returns:
          (uint8 ``[count, 2 * bytes of n]``, layout); both go to ``PublicKey.from_bytes``.
        """
        ready = self.masked() if self.layout.computed else self
        return residues.to_rows(ready._cells.ravel(), residues.width_of(int(self.public.square))), ready.layout

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

    def _made(
        self,
        cells: np.ndarray,
        *,
        bound: int,
        multiplier_bits: int = 0,
        terms: int = 1,
        scale_bits: int | None = None,
        shape: tuple[int, ...] | None = None,
        pack_axis: int | None = None,
    ) -> EncryptedArray:
        layout, bits = self.layout, self.public.bits
        made = Layout(
            layout.shape if shape is None else shape,
            layout.scale_bits if scale_bits is None else scale_bits,
            bound,
            layout.pack_axis if shape is None else pack_axis,
            layout.slot_bits,
            bits_to_hide(layout.mask_bits, multiplier_bits, terms, bits),
            computed=True,
        )
        return EncryptedArray(self.public, made, cells)

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
        cells = self._cells * other._cells % self.public.square
        wider = replace(mine, mask_bits=max(mine.mask_bits, its.mask_bits))
        made = EncryptedArray(self.public, wider, self._cells)
        return made._made(cells, bound=mine.bound + its.bound, terms=2)

    def _plus_plain(self, other: Any) -> EncryptedArray:
        layout, n = self.layout, self.public.n
        integers = np.broadcast_to(encode(other, layout.scale_bits, _room(layout.scale_bits), who="+"), layout.shape)
        most = int(np.abs(integers).max(initial=0))
        packed = _packed(integers, layout.pack_axis, layout.slots(self.public.bits))
        cells = self._cells * (1 + n * (packed % n)) % self.public.square
        return self._made(cells, bound=layout.bound + most)

    def _times(self, factors: np.ndarray, scale_bits: int) -> EncryptedArray:
        layout = self.layout
        if factors.ndim > len(layout.shape):
            raise ConfigError(f"product of shape {list(layout.shape)} with {list(factors.shape)}: too many axes")
        whole = factors.reshape((1,) * (len(layout.shape) - factors.ndim) + factors.shape)
        if layout.pack_axis is not None and whole.shape[layout.pack_axis] != 1:
            raise ConfigError(
                f"product: the numbers along axis {layout.pack_axis} are packed, so they have one factor; encrypt "
                "without pack_axis, or along another axis"
            )
        most = int(np.abs(whole).max(initial=0))
        spread = np.broadcast_to(whole, self._cells.shape)
        square = self.public.square
        cells = [powmod(cell, int(each), square) for cell, each in zip(self._cells.ravel(), spread.ravel())]
        return self._made(
            _objects(cells, self._cells.shape), bound=layout.bound * most, multiplier_bits=most.bit_length(),
            scale_bits=layout.scale_bits + scale_bits,
        )  # fmt: skip

    def _matmul(self, matrix: np.ndarray, scale_bits: int) -> EncryptedArray:
        layout, n, square = self.layout, self.public.n, self.public.square
        if len(layout.shape) != 2 or matrix.ndim != 2 or layout.shape[1] != matrix.shape[0]:
            raise ConfigError(
                f"matrix product of shapes {list(layout.shape)} and {list(matrix.shape)}: expected [B, d] and [d, u]"
            )
        if layout.pack_axis == 1:
            raise ConfigError(
                "matrix product: the numbers along axis 1 are packed, and cannot be added up; pack along axis 0"
            )
        bits = int(np.abs(matrix).max(initial=0)).bit_length() + 1
        offset = 1 << (bits - 1)
        exponents = (matrix + offset).astype(np.uint64)
        rows = []
        for bases in self._cells:
            common = mpz(1)
            for base in bases:
                common = common * base % square
            without = invert(powmod(common, offset, square), square)
            products = multiexp(list(bases), exponents, bits, n, self.public.masks.draw().finished(n, square))
            rows.append([product.finished(n, square) * without % square for product in products])
        shape = (layout.shape[0], matrix.shape[1])
        made = _objects([cell for row in rows for cell in row], (len(rows), matrix.shape[1]))
        norm = int(np.abs(matrix.astype(object)).sum(0).max(initial=0))
        return self._made(
            made, bound=layout.bound * norm, multiplier_bits=bits, terms=2 * matrix.shape[0],
            scale_bits=layout.scale_bits + scale_bits, shape=shape, pack_axis=layout.pack_axis,
        )  # fmt: skip

    def _axis(self, axis: int, what: str) -> int:
        axes = len(self.shape)
        if not -axes <= axis < axes:
            raise ConfigError(f"{what}: no axis {axis} in shape {list(self.shape)}")
        if axis % axes == self.layout.pack_axis:
            raise ConfigError(f"{what}: the numbers along axis {axis} are packed, and cannot be added up")
        return axis % axes


def encrypt(
    public: PublicKey,
    values: Any,
    scale_bits: int | None,
    limit: float | None,
    pack_axis: int | None,
    headroom_bits: int | None,
    clip: bool,
) -> EncryptedArray:
    """See ``PublicKey.encrypt``."""
    held = np.asarray(values)
    scale = scale_bits if scale_bits is not None else _SCALE_BITS if held.dtype.kind == "f" else 0
    if pack_axis is not None and (limit is None or headroom_bits is None or not -held.ndim <= pack_axis < held.ndim):
        raise ConfigError(
            f"encrypt: pack_axis={pack_axis} of shape {list(held.shape)}: expected one of its axes, and limit and "
            "headroom_bits, from which follows how many numbers a ciphertext holds"
        )
    largest = limit if limit is not None else min(_LIMIT, _room(scale))
    integers = encode(held, scale, largest, clip)
    bound = math.ceil(largest * 2**scale)
    axis = None if pack_axis is None else pack_axis % held.ndim
    slot_bits = 0 if axis is None else bound.bit_length() + int(headroom_bits or 0) + 2
    layout = Layout(held.shape, scale, bound, axis, slot_bits, public.masks.fresh_bits)
    packed = _packed(integers, axis, layout.slots(public.bits))
    cells = public.encrypt_residues(packed.ravel().tolist())
    return EncryptedArray(public, layout, _objects(cells, packed.shape))


def from_bytes(public: PublicKey, rows: np.ndarray, layout: Layout) -> EncryptedArray:
    """See ``PublicKey.from_bytes``."""
    shape, width = layout.cells(public.bits), residues.width_of(int(public.square))
    if rows.dtype != np.uint8 or rows.shape != (math.prod(shape), width):
        raise DataError(
            f"encrypted array of shape {list(layout.shape)}: expected {math.prod(shape)} ciphertexts of {width} bytes, "
            f"got {rows.dtype} {list(rows.shape)}"
        )
    cells = residues.from_rows(rows)
    public.check_ciphertexts(cells, "an encrypted array", of_efl=True)
    return EncryptedArray(public, layout, _objects(cells, shape))


def from_phe(public: PublicKey, numbers: Sequence[Any], limit: float) -> EncryptedArray:
    """See ``PublicKey.from_phe``."""
    if any(int(each.public_key.n) != public.n for each in numbers):
        raise ConfigError("from_phe: a number is encrypted for another key")
    least = min((each.exponent for each in numbers), default=0)
    finer = min(least, 0)
    cells = [powmod(mpz(each.ciphertext()), mpz(16) ** (each.exponent - finer), public.square) for each in numbers]
    public.check_ciphertexts(cells, "phe's numbers")
    layout = Layout((len(cells),), -4 * finer, math.ceil(limit) << (-4 * finer), None, 0, public.bits, computed=True)
    return EncryptedArray(public, layout, _objects(cells, (len(cells),)))


def decrypt(private: PrivateKey, array: EncryptedArray, exact: bool) -> np.ndarray:
    """See ``PrivateKey.decrypt``."""
    if array.public != private.public:
        raise ConfigError(f"decrypt: encrypted for key {array.public.fingerprint}, not {private.public.fingerprint}")
    layout, n = array.layout, private.public.n
    half = n // 2
    found = decrypted(private, array._cells.ravel().tolist(), "what is to be decrypted", processors())
    numbers = [each - n if each > half else each for each in found]
    cells = _objects(numbers, array._cells.shape)
    slots = layout.slots(private.public.bits)
    if slots is None or layout.pack_axis is None:
        integers = cells
    else:
        integers = np.empty(layout.shape, object)
        moved, out = np.moveaxis(cells, layout.pack_axis, -1), np.moveaxis(integers, layout.pack_axis, -1)
        for index in np.ndindex(moved.shape[:-1]):
            out[index] = slots.unpack(moved[index])
    if any(abs(each) > layout.bound for each in integers.ravel()):
        raise DataError(
            "decrypt: a number is larger than it can be: the array was not computed as its layout says, or with "
            "another key"
        )
    return _plain(integers) if exact else decode(integers, layout.scale_bits)


def _plain(integers: np.ndarray) -> np.ndarray:
    return _objects([int(each) for each in integers.ravel()], integers.shape)


def _room(scale_bits: int) -> float:
    """The largest magnitude of what is encoded at a scale."""
    return 2.0 ** max(0, MOST_BITS - 1 - scale_bits)


def _objects(values: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    made = np.empty(len(values), object)
    made[:] = values
    return made.reshape(shape)


def _packed(integers: np.ndarray, axis: int | None, slots: Slots | None) -> np.ndarray:
    if slots is None or axis is None:
        return _objects([mpz(each) for each in integers.ravel().tolist()], integers.shape)
    moved = np.moveaxis(integers, axis, -1)
    packed = np.empty((*moved.shape[:-1], slots.groups), object)
    for index in np.ndindex(moved.shape[:-1]):
        packed[index] = slots.pack(moved[index])
    return np.moveaxis(packed, -1, axis)
