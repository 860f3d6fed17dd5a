"""What becomes an encrypted array, and what an encrypted array becomes: of numbers, of messages, of phe's numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from gmpy2 import mpz, powmod

from efl.errors import ConfigError, DataError
from efl.paillier import residues
from efl.paillier.array import EncryptedArray
from efl.paillier.decryption import decrypted, processors
from efl.paillier.encoding import bound_of, decode, encode, float_of, numbers_of, whole
from efl.paillier.layout import Layout, objects, packed_of, room_of

if TYPE_CHECKING:
    from efl.paillier.private_key import PrivateKey
    from efl.paillier.public_key import PublicKey

_SCALE_BITS = 16
_LIMIT = 2.0**32


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
    held = numbers_of(values, "encrypt")
    scale = _SCALE_BITS if held.dtype.kind == "f" else 0
    if scale_bits is not None:
        scale = whole(scale_bits, "scale_bits", "encrypt")
    if pack_axis is not None:
        pack_axis = whole(pack_axis, "pack_axis", "encrypt")
    if pack_axis is not None and (limit is None or headroom_bits is None or not -held.ndim <= pack_axis < held.ndim):
        raise ConfigError(
            f"encrypt: pack_axis={pack_axis} of shape {list(held.shape)}: expected one of its axes, and limit and "
            "headroom_bits, from which follows how many numbers a ciphertext holds"
        )
    headroom = 0 if headroom_bits is None else whole(headroom_bits, "headroom_bits", "encrypt")
    if headroom < 0:
        raise ConfigError(f"encrypt: headroom_bits={headroom}: expected at least 0")
    largest = float_of(limit, "encrypt") if limit is not None else min(_LIMIT, room_of(scale))
    integers = encode(held, scale, largest, clip)
    bound = bound_of(largest, scale)
    axis = None if pack_axis is None else pack_axis % held.ndim
    slot_bits = 0 if axis is None else bound.bit_length() + headroom + 2
    layout = Layout(held.shape, scale, bound, axis, slot_bits, public.masks.fresh_bits)
    packed = packed_of(integers, axis, layout.slots(public.bits))
    cells = public.encrypt_residues(packed.ravel().tolist())
    return EncryptedArray(public, layout, objects(cells, packed.shape))


def from_bytes(public: PublicKey, rows: np.ndarray, layout: Layout) -> EncryptedArray:
    """See ``PublicKey.from_bytes``."""
    shape, width = layout.cells(public.bits), residues.width_of(int(public.square))
    if rows.dtype != np.uint8 or rows.shape != (math.prod(shape), width):
        raise DataError(
            f"encrypted array of shape {list(layout.shape)}: expected {math.prod(shape)} ciphertexts of {width} bytes, "
            f"got {rows.dtype} {list(rows.shape)}"
        )
    cells = residues.from_rows(rows)
    public.check_ciphertexts(cells, "an encrypted array", of_efl=not layout.foreign)
    return EncryptedArray(public, layout, objects(cells, shape))


def from_phe(public: PublicKey, numbers: Sequence[Any], limit: float) -> EncryptedArray:
    """See ``PublicKey.from_phe``."""
    if any(int(each.public_key.n) != public.n for each in numbers):
        raise ConfigError("from_phe: a number is encrypted for another key")
    least = min((each.exponent for each in numbers), default=0)
    finer = min(least, 0)
    cells = [powmod(mpz(each.ciphertext()), mpz(16) ** (each.exponent - finer), public.square) for each in numbers]
    public.check_ciphertexts(cells, "phe's numbers")
    scale, shape = -4 * finer, (len(cells),)
    bound = bound_of(float_of(limit, "from_phe"), scale)
    # A key of no kind has such masks itself.
    layout = Layout(shape, scale, bound, None, 0, public.bits, computed=True, foreign=bool(public.kind))
    return EncryptedArray(public, layout, objects(cells, shape))


def decrypt(private: PrivateKey, array: EncryptedArray, exact: bool) -> np.ndarray:
    """See ``PrivateKey.decrypt``."""
    if array.public != private.public:
        raise ConfigError(f"decrypt: encrypted for key {array.public.fingerprint}, not {private.public.fingerprint}")
    layout, n = array.layout, private.public.n
    half = n // 2
    found = decrypted(private, array._cells.ravel().tolist(), "what is to be decrypted", processors())
    numbers = [each - n if each > half else each for each in found]
    cells = objects(numbers, array._cells.shape)
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
    return objects([int(each) for each in integers.ravel()], integers.shape)
