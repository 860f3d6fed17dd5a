"""How an encrypted array's numbers lie in its ciphertexts, and what a receiver is told of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from gmpy2 import mpz

from efl.errors import ConfigError
from efl.paillier.encoding import MOST_BITS
from efl.paillier.slots import Slots

if TYPE_CHECKING:
    from efl.paillier.public_key import PublicKey


@dataclass(frozen=True)
class Layout:
    """What a receiver has to know of an array, beside the key. Tells nothing of its values.

    The layout of an array that was computed here tells of its operands, in ``bound`` and ``mask_bits``. The one that
    ``to_bytes`` returns tells nothing of them: see there.

    Attributes:
      shape: Of the array.
      scale_bits: Numbers are multiples of ``2**-scale_bits``.
      bound: The largest magnitude of their integers. As it leaves: of ``limit``; without one, of an array that was
        computed, the most that its ciphertexts can hold.
      pack_axis: The axis along which ciphertexts hold several numbers; None: each holds one.
      slot_bits: Bits for each of several.
      mask_bits: Of the longest exponent that masks one. As it leaves, of an array that was computed: as many as n has.
      computed: Whether it was computed, and not masked since. As it leaves: False.
      foreign: Whether it comes from phe's numbers, which have other masks than this key's.
    """

    shape: tuple[int, ...]
    scale_bits: int
    bound: int
    pack_axis: int | None
    slot_bits: int
    mask_bits: int
    computed: bool = False
    foreign: bool = False

    def slots(self, key_bits: int) -> Slots | None:
        """How numbers lie along ``pack_axis``."""
        return None if self.pack_axis is None else Slots.fit(self.shape[self.pack_axis], self.slot_bits, key_bits)

    def cells(self, key_bits: int) -> tuple[int, ...]:
        """The shape of the ciphertexts."""
        slots = self.slots(key_bits)
        if slots is None or self.pack_axis is None:
            return self.shape
        return (*self.shape[: self.pack_axis], slots.groups, *self.shape[self.pack_axis + 1 :])


def most_of(public: PublicKey, layout: Layout) -> int:
    """The largest magnitude that a place can hold."""
    slots = layout.slots(public.bits)
    # One bit is left free: what wanders out of its place is met there.
    return (int(public.n) - 1) // 2 if slots is None else slots.limit // 2 - 1


def check_room(public: PublicKey, layout: Layout) -> None:
    """Refuses a layout whose numbers could leave their places.

    Raises:
      ConfigError: They could.
    """
    if layout.bound > most_of(public, layout):
        room = "one ciphertext" if layout.pack_axis is None else f"slots of {layout.slot_bits} bits"
        raise ConfigError(
            f"encrypted numbers could reach {layout.bound.bit_length()} bits, which {room} cannot hold: encrypt "
            "with more headroom_bits, with a smaller limit or scale_bits, or multiply by smaller numbers; where the "
            "array was computed by another party, that has to give to_bytes a limit"
        )


def room_of(scale_bits: int) -> float:
    """The largest magnitude of what is encoded at a scale."""
    return 2.0 ** max(0, MOST_BITS - 1 - scale_bits)


def objects(values: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """An array of objects, of a shape; numpy would look into them."""
    made = np.empty(len(values), object)
    made[:] = values
    return made.reshape(shape)


def packed_of(integers: np.ndarray, axis: int | None, slots: Slots | None) -> np.ndarray:
    """The plaintexts of integers: each by itself, or several along an axis."""
    if slots is None or axis is None:
        return objects([mpz(each) for each in integers.ravel().tolist()], integers.shape)
    moved = np.moveaxis(integers, axis, -1)
    packed = np.empty((*moved.shape[:-1], slots.groups), object)
    for index in np.ndindex(moved.shape[:-1]):
        packed[index] = slots.pack(moved[index])
    return np.moveaxis(packed, -1, axis)
