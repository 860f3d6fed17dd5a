"""Matrices of integers in packed plaintexts, against sums of Python's own integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gmpy2 import mpz
from hypothesis import given, settings
from hypothesis import strategies as st

from efl.errors import DataError
from efl.paillier import packing
from efl.paillier.slots import Slots

KEY_BITS = 2048
N = mpz(2) ** KEY_BITS - 1557  # any modulus of that length: packing asks for no primes
INT64 = (-(1 << 63), (1 << 63) - 1)

layouts = st.builds(
    Slots.fit, length=st.integers(1, 130), bits=st.integers(34, 100), key_bits=st.sampled_from([KEY_BITS, 3072])
)


def matrix(data: Any, length: int, least: int, most: int, ends: tuple[int, ...] = ()) -> list[list[int]]:
    """``[length, m]`` integers, among which the ends of their range are frequent."""
    m, random = data.draw(st.integers(1, 3)), data.draw(st.randoms(use_true_random=False))
    ends = (least, most, 0, -1, 1, *ends)
    return [
        [random.choice(ends) if random.random() < 0.5 else random.randint(least, most) for _ in range(m)]
        for _ in range(length)
    ]


def array_of(rows: list[list[int]], wide: bool) -> np.ndarray:
    return np.array(rows, dtype=object if wide else np.int64)


def packed(rows: list[list[int]], slots: Slots) -> list[list[int]]:
    """What the plaintexts have to be, by the definition."""
    return [
        [
            sum(
                row[j] << slots.bits * s for s, row in enumerate(rows[g * slots.count : (g + 1) * slots.count])
            )
            for j in range(len(rows[0]))
        ]
        for g in range(slots.groups)
    ]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(layouts, st.data())
def test_numbers_that_fit_come_back(slots: Slots, data: Any) -> None:
    most = slots.limit - 1
    rows = matrix(data, slots.length, -most, most)
    plain = packing.pack(array_of(rows, slots.bits > 62), slots)
    assert plain.tolist() == packed(rows, slots)
    # On their own side of zero for every n of so many bits.
    assert all(4 * abs(each) < 1 << (KEY_BITS if slots.bits * slots.count < KEY_BITS else 3072) for each in plain.flat)
    found = packing.unpack(plain, slots, most, "these")
    assert found.tolist() == rows
    assert found.dtype == (np.int64 if slots.bits <= 62 else object)


@settings(max_examples=60, deadline=None)
@given(layouts, st.integers(1, 62), st.integers(1, 4), st.data())
def test_limbs_of_any_size_add_up(slots: Slots, limb_bits: int, count: int, data: Any) -> None:
    limbs = [matrix(data, slots.length, *INT64) for _ in range(count)]
    columns = min(len(limb[0]) for limb in limbs)
    limbs = [[row[:columns] for row in limb] for limb in limbs]
    plain = packing.pack_wide([array_of(limb, False) for limb in limbs], limb_bits, slots)
    whole = [
        [sum(limb[i][j] << limb_bits * k for k, limb in enumerate(limbs)) for j in range(columns)]
        for i in range(slots.length)
    ]
    assert plain.tolist() == packed(whole, slots)


@settings(max_examples=50, deadline=None)
@given(layouts, st.data())
def test_shares_that_leave_their_slots_cancel(slots: Slots, data: Any) -> None:
    """Each is uniform over 63 bits and runs over into its neighbours; only their sum mod n is of numbers that fit."""
    n = N if slots.bits * slots.count < KEY_BITS else mpz(2) ** 3072 - 1103717
    most = min(slots.limit - 1, 1 << 40)
    rows = matrix(data, slots.length, -most, most)
    m, random = len(rows[0]), data.draw(st.randoms(use_true_random=False))
    share = [[random.choice([random.getrandbits(63), -random.getrandbits(63)]) for _ in range(m)] for _ in rows]
    other = [[value - part for value, part in zip(*both)] for both in zip(rows, share)]
    low = [[part & ((1 << 50) - 1) for part in row] for row in other]
    high = [[part >> 50 for part in row] for row in other]
    total = packing.pack_wide([array_of(share, False)], 0, slots)
    total = total + packing.pack_wide([array_of(low, False), array_of(high, False)], 50, slots)
    mask = np.array([[mpz(random.getrandbits(3100)) for _ in row] for row in total], object)
    back = (total + mask) % n - mask  # as the rounds do it
    assert packing.unpack(packing.centred(back, n), slots, most, "these").tolist() == rows


@settings(max_examples=50, deadline=None)
@given(layouts, st.data())
def test_what_is_beyond_its_bound_is_refused(slots: Slots, data: Any) -> None:
    bound = data.draw(st.sampled_from([0, 1, 12345, slots.limit - 2]))
    at = data.draw(st.integers(0, slots.length - 1))
    rows = [[0] for _ in range(slots.length)]
    for value in (bound, -bound, bound + 1, -bound - 1):
        rows[at][0] = value
        plain = packing.pack(array_of(rows, slots.bits > 62), slots)
        if abs(value) <= bound:
            assert packing.unpack(plain, slots, bound, "these").tolist() == rows
        else:
            with pytest.raises(DataError, match="these: decrypted numbers are beyond"):
                packing.unpack(plain, slots, bound, "these")


@pytest.mark.parametrize("bits", [34, 39, 61, 62, 63, 75, 100])
def test_what_does_not_fit_in_a_slot_never_becomes_a_neighbours(bits: int) -> None:
    slots = Slots.fit(5, bits, KEY_BITS)
    for value in (slots.limit, -slots.limit - 1, 2 * slots.limit, -3 * slots.limit, *INT64):
        if abs(value) < slots.limit:
            continue
        rows = np.array([[0], [value], [0], [0], [0]], object if bits > 62 or abs(value) > INT64[1] else np.int64)
        with pytest.raises((ValueError, TypeError, OverflowError)):
            packing.pack(rows, slots)
    for wild in (mpz(1) << bits * slots.count, -(mpz(1) << bits * slots.count), mpz(1) << (KEY_BITS - 1)):
        with pytest.raises(DataError, match="these: decrypted numbers are beyond"):
            packing.unpack(np.array([[wild]], object), slots, slots.limit - 1, "these")


def test_the_unused_slots_of_the_last_plaintext_hold_nothing() -> None:
    slots = Slots.fit(53, 39, KEY_BITS)  # two plaintexts of 27
    assert (slots.groups, slots.count) == (2, 27)
    most = np.full((53, 1), slots.limit - 1)
    last = packing.pack(most, slots)[1, 0]
    assert 0 < last < mpz(1) << 39 * 26
    wide = packing.pack_wide([np.full((53, 1), INT64[1])], 0, slots)[1, 0]
    assert wide == INT64[1] * sum(1 << 39 * s for s in range(26))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-(1 << 2100), 1 << 2100), min_size=1, max_size=5))
def test_centred_is_the_smallest_in_magnitude(numbers: list[int]) -> None:
    numbers += [0, -1, int(N // 2), int(N // 2) + 1, int(N) - 1, int(N)]
    found = packing.centred(np.array([[mpz(each)] for each in numbers], object), N)
    assert found.shape == (len(numbers), 1)
    for each, value in zip(numbers, found.ravel()):
        assert (value - each) % N == 0 and 2 * abs(value) < N


def test_of_no_numbers_there_is_no_plaintext() -> None:
    slots = Slots.fit(0, 39, KEY_BITS)
    assert (slots.length, slots.groups) == (0, 0)
    assert slots.pack([]) == [] and slots.unpack([]) == []
    plain = packing.pack(np.zeros((0, 3), np.int64), slots)
    assert plain.shape == (0, 3) and packing.unpack(plain, slots, 5, "these").shape == (0, 3)
