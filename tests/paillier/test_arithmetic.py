"""Powers, products of powers, slots and rows of bytes, against Python's own integers."""

from __future__ import annotations

import secrets

import numpy as np
import pytest
from gmpy2 import mpz, powmod
from hypothesis import given, settings
from hypothesis import strategies as st

from efl.errors import ConfigError, DataError
from efl.paillier import kernels, residues
from efl.paillier.encoding import decode, encode
from efl.paillier.factored import Product, Split
from efl.paillier.fixed_base import FixedBase
from efl.paillier.masks import bits_to_hide
from efl.paillier.multiexp import multiexp
from efl.paillier.slots import Slots
from tests.paillier.keypairs import key


def elements(count: int) -> list[mpz]:
    square = int(key().public.square)
    return [mpz(secrets.randbelow(square)) for _ in range(count)]


def test_split_elements_multiply_as_they_do_whole() -> None:
    public = key().public
    one, two = elements(2)
    both = Split.of(one, public.n).times(Split.of(two, public.n), public.n)
    assert Product(both.low, both.tail).finished(public.n, public.square) == one * two % public.square
    assert both.low < public.n and both.low * both.inverse % public.n == 1


@pytest.mark.parametrize("window", [1, 5, 8])
def test_powers_of_one_base(window: int) -> None:
    public, (base,) = key().public, elements(1)
    table = FixedBase(base, public.n, 40, window)
    for exponent in (0, 1, 255, 256, 2**40 - 1, secrets.randbits(40)):
        assert table.power(exponent, 40).finished(public.n, public.square) == powmod(base, exponent, public.square)
    for exponent, bits in ((1, 41), (256, 8), (2**40, 40)):
        with pytest.raises(ValueError, match="bits, a table of 40"):  # part of it would be left out
            table.power(exponent, bits)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 6), st.integers(1, 64), st.randoms(use_true_random=False))
def test_products_of_powers(bases: int, outputs: int, bits: int, random) -> None:
    public, held = key().public, elements(bases)
    numbers = [[random.choice([0, 2**bits - 1, random.getrandbits(bits)]) for _ in range(outputs)] for _ in held]
    exponents = np.array(numbers, dtype=object).astype(np.uint64).reshape(bases, outputs)
    made = multiexp(held, exponents, bits, public.n)
    for output, product in enumerate(made):
        expected = mpz(1)
        for base, row in zip(held, numbers):
            expected = expected * powmod(base, row[output], public.square) % public.square
        assert product.finished(public.n, public.square) == expected


def test_how_many_products_are_formed_does_not_follow_from_the_exponents(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []

    class Counting:
        def __init__(self, value: mpz) -> None:
            self.value = value

        def __rmul__(self, other: mpz) -> mpz:
            counts[-1] += 1
            return other * self.value

    real = __import__("efl.paillier.multiexp", fromlist=["_subsets"])._subsets
    monkeypatch.setattr(
        "efl.paillier.multiexp._subsets",
        lambda block, n, blank: [each._replace(low=Counting(each.low)) for each in real(block, n, blank)],
    )
    held = elements(12)
    for exponents in (np.zeros((12, 3), np.uint64), np.full((12, 3), 2**14 - 1, np.uint64)):
        counts.append(0)
        multiexp(held, exponents, 14, key().public.n)
    assert counts[0] == counts[1] > 0


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.integers(2, 120), st.sampled_from([2048, 3072]), st.data())
def test_slots_hold_every_number_up_to_their_limit(length: int, bits: int, key_bits: int, data) -> None:
    slots = Slots.fit(length, bits, key_bits)
    most = slots.limit - 1
    ends = st.sampled_from([-most, most, 0, -1])
    values = data.draw(st.lists(st.one_of(ends, st.integers(-most, most)), min_size=length, max_size=length))
    packed = slots.pack(values)
    assert len(packed) == slots.groups and slots.groups * slots.count >= length > (slots.groups - 1) * slots.count
    assert all(2 * abs(each) < 1 << (key_bits - 1) for each in packed)  # on their own side of zero, for every n
    assert slots.unpack(packed) == values


def test_the_empty_subset_is_as_wide_as_others_and_adds_nothing() -> None:
    private = key()
    n, blank = private.public.n, private.public.encrypt_residues([0])[0]
    held = private.public.encrypt_residues([3, 5])
    for exponents in ([[0], [0]], [[1], [2]], [[2**14 - 1], [0]]):
        (made,) = multiexp(held, np.array(exponents, np.uint64), 14, n, blank)
        assert made.head.bit_length() > 2 * n.bit_length() - 64  # of full width: 0 looks like any other
        expected = 3 * exponents[0][0] + 5 * exponents[1][0]
        assert private.decrypt_residues([made.finished(n, private.public.square)]) == [expected]


def test_products_of_no_powers_are_fresh_encryptions_of_nothing() -> None:
    """An exponent of zero must not show: neither as a one, nor as the same element again."""
    public, nothing = key().public, np.zeros((3, 1), np.uint64)
    bases = public.encrypt_residues([5, 6, 7])
    found = [kernels.products(public, bases, nothing, 14) for _ in range(2)]
    found.append(kernels.spread(public, bases[0], nothing, 14, 40))
    made = [each.finished(public.n, public.square) for row in found for each in row]
    assert len({1, *made}) == 4 and key().decrypt_residues(made, "test") == [0] * 3


def test_what_was_not_made_of_such_slots_is_refused() -> None:
    slots = Slots.fit(3, 10, 2048)
    for bad in (1 << 31, -(1 << 31)):
        with pytest.raises(DataError, match="outside of its 3 slots of 10 bits"):
            slots.unpack([mpz(bad)])
    with pytest.raises(ConfigError, match="a slot of 2048 bits does not fit"):
        Slots.fit(1, 2048, 2048)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 256**5 - 1)))
def test_rows_of_bytes_come_back(numbers: list[int]) -> None:
    rows = residues.to_rows(numbers, 5)
    assert rows.shape == (len(numbers), 5) and residues.from_rows(rows) == numbers


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1000, 1000), min_size=1), st.integers(0, 40))
def test_fixed_point_is_the_nearest(values: list[float], scale_bits: int) -> None:
    integers = encode(values, scale_bits, 1000.0)
    np.testing.assert_array_equal(integers, np.rint(np.array(values) * 2.0**scale_bits))
    assert np.abs(decode(integers.astype(object), scale_bits) - values).max() <= 2.0 ** -(scale_bits + 1)


def test_what_cannot_be_encoded_is_refused_or_clipped(caplog: pytest.LogCaptureFixture) -> None:
    for values, message in (([np.nan, 1.0], "1 of 2 values are NaN"), ([33.0, -40.0, 1.0], "2 of 3 values are larger")):
        with pytest.raises(DataError, match=message):
            encode(values, 14, 32.0)
    assert encode([33.0, -40.0, 1.0], 2, 32.0, clip=True).tolist() == [128, -128, 4]
    assert "2 of 3 values are larger than 32 in magnitude, and were clipped" in caplog.text
    for bad in ({"scale_bits": 60, "limit": 8.0}, {"scale_bits": -1, "limit": 8.0}, {"scale_bits": 1, "limit": 0.0}):
        with pytest.raises(ConfigError, match="expected at most 62 bits together"):
            encode([1.0], **bad)
    with pytest.raises(ConfigError, match="expected real numbers"):
        encode(["a"], 1, 1.0)


def test_masks_are_as_long_as_what_they_hide() -> None:
    assert bits_to_hide(1024, 0, 1, 2048) == 1024
    assert bits_to_hide(1024, 62, 128, 2048) == 1024 + 62 + 7
    assert bits_to_hide(1024, 2000, 2, 2048) == 2048  # masks repeat
