"""Encrypted arrays, against numpy and phe."""

from __future__ import annotations

import gmpy2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efl.errors import ConfigError, DataError
from efl.paillier import PrivateKey
from tests.paillier.keypairs import key
from tests.paillier.test_keys import of_phe

phe = pytest.importorskip("phe")
RNG = np.random.default_rng(0)
X, W = RNG.normal(size=(6, 4)), RNG.normal(size=(4, 3))


def both(values: np.ndarray, axis: int = 0) -> list:
    """The values one in each ciphertext, and packed."""
    public = key().public
    return [public.encrypt(values), public.encrypt(values, limit=8.0, pack_axis=axis, headroom_bits=24)]


def decrypted(array) -> np.ndarray:
    return key().decrypt(array)


def test_packing_takes_fewer_ciphertexts():
    public = key().public
    packed = public.encrypt(RNG.normal(size=(256, 3)), limit=8.0, pack_axis=0, headroom_bits=17)
    rows, _ = packed.to_bytes()
    assert rows.shape == (5 * 3, 512)  # 52 slots of 39 bits


@pytest.mark.parametrize("packed", [0, 1])
def test_sums_and_products_are_numpys(packed):
    one, two = both(X)[packed], both(X[::-1].copy())[packed]
    exact = X.round(4)
    for got, expected in (
        (one, X),
        (one + two, X + X[::-1]),
        (one - two, X - X[::-1]),
        (one + 1.5, X + 1.5),
        (2 - one, 2 - X),
        (one - X[0], X - X[0]),
        (-one, -X),
        (one * 3, 3 * X),
        ([1, -2, 0, 5] * one, X * [1, -2, 0, 5]),
        (one.times(0.25, scale_bits=2), X / 4),
        (one @ np.array([[1, 0], [-2, 3], [0, 0], [7, 1]]), X @ [[1, 0], [-2, 3], [0, 0], [7, 1]]),
        (one.matmul(W, scale_bits=20), X @ W),
        (one.sum(1), X.sum(1)),
        (one.sum(-1).sum(0) if not packed else one.sum(-1), X.sum() if not packed else X.sum(-1)),
        (one.rescale(20) + exact * 2**-4, X + exact * 2**-4),
        (
            (one @ np.eye(4, dtype=int) * 2 + two.rescale(16)).matmul(W[:, :1], scale_bits=4),
            (2 * X + X[::-1]) @ W[:, :1],
        ),
    ):
        assert got.shape == np.shape(expected)
        np.testing.assert_allclose(decrypted(got), expected, atol=0.3 if got.scale_bits == 20 else 2e-4)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_integers_are_exact_for_any_shape(data):
    rows, columns, outputs = (data.draw(st.integers(1, 5)) for _ in range(3))
    numbers = st.integers(-(2**30), 2**30)

    def matrix(a, b):
        return np.array(data.draw(st.lists(numbers, min_size=a * b, max_size=a * b))).reshape(a, b)

    x, m = matrix(rows, columns), matrix(columns, outputs)
    for array in (
        key().public.encrypt(x),
        key().public.encrypt(x, limit=2.0**30, pack_axis=0, headroom_bits=40),
    ):
        got = key().decrypt(array @ m, exact=True)
        np.testing.assert_array_equal(got, x.astype(object) @ m.astype(object))


def test_what_might_not_fit_is_refused_before_it_is_computed():
    array = key().public.encrypt(X, limit=8.0, pack_axis=0, headroom_bits=4)
    assert (array * 31).shape == X.shape
    for compute in (lambda: array * 33, lambda: array.matmul(W * 100, scale_bits=4), lambda: array * 20 + array * 20):
        with pytest.raises(ConfigError, match="slots of 26 bits cannot hold: encrypt with more headroom_bits"):
            compute()
    alone = key().public.encrypt(np.array([2**40]), limit=2.0**60)
    for _ in range(40):
        alone = alone * 2**58 if alone.layout.bound.bit_length() < 1950 else alone
    with pytest.raises(ConfigError, match="which one ciphertext cannot hold"):
        alone * 2**62 * 2**62


def test_what_does_not_go_together_is_named():
    plain, packed = both(X)
    other = PrivateKey.generate(2048).public.encrypt(X)
    for compute, message in (
        (lambda: plain + packed, "of different packing"),
        (lambda: plain + other, "of different key"),
        (lambda: plain + plain.sum(0), "of different shape"),
        (lambda: plain + plain.rescale(20), "of different scale_bits: 16 and 20"),
        (lambda: packed.sum(0), "the numbers along axis 0 are packed, and cannot be added up"),
        (lambda: packed * np.arange(6)[:, np.newaxis], "the numbers along axis 0 are packed, so they have one factor"),
        (lambda: both(X, 1)[1] @ W.astype(int), "the numbers along axis 1 are packed, and cannot be added up"),
        (lambda: plain @ W.T.astype(int), r"shapes \[6, 4\] and \[3, 4\]: expected \[B, d\] and \[d, u\]"),
        (lambda: plain.sum(2), r"no axis 2 in shape \[6, 4\]"),
        (lambda: plain.rescale(3), "expected at least the scale that it has, 16 bits"),
        (lambda: key().public.encrypt(X, pack_axis=0), "expected one of its axes, and limit and headroom_bits"),
        (lambda: key().decrypt(other), "encrypted for key"),
    ):
        with pytest.raises(ConfigError, match=message):
            compute()
    for compute in (
        lambda: plain * 0.5,
        lambda: plain @ W,
        lambda: bool(plain),
        lambda: list(plain),
        lambda: plain == 1,
    ):
        with pytest.raises(TypeError, match="of floats say their scale|decrypt them first"):
            compute()
    with pytest.raises(DataError, match="1 of 2 values are NaN or infinite"):
        key().public.encrypt([1.0, np.inf])


def test_what_was_computed_leaves_under_fresh_masks():
    public = key().public
    array = public.encrypt(np.array([1, 2, 3]))
    same, _ = array.to_bytes()
    assert (same == array.to_bytes()[0]).all()
    for made in (array + 1, array + array, array * 2, array.sum().sum() if False else array.sum()):
        one, layout = made.to_bytes()
        two, _ = made.to_bytes()
        assert (one != two).any(-1).all()
        assert layout.computed is False
        np.testing.assert_array_equal(key().decrypt(public.from_bytes(one, layout)), key().decrypt(made))
        # Of ciphertexts that differ by a number alone, that number could be read without any key.
        ratio = made._cells.ravel()[0] * gmpy2.invert(array._cells.ravel()[0], public.square) % public.square
        assert made.layout.computed and ratio


def test_masks_grow_with_what_they_have_to_hide(monkeypatch: pytest.MonkeyPatch):
    asked = []
    masks = key().public.masks
    draw = masks.draw
    monkeypatch.setattr(masks, "draw", lambda bits=None: asked.append(bits) or draw(bits))
    array = key().public.encrypt(X[:, :2])
    asked.clear()
    array.matmul(W[:2, :1] * 0 + 1.0, scale_bits=10).to_bytes()
    # Multipliers of 12 bits with their sign, four terms with the offsets; and what stands for empty subsets.
    assert set(asked) == {1024 + 12 + 2 + 40, None}


def test_a_message_that_is_none_of_this_layout_is_refused():
    public = key().public
    rows, layout = public.encrypt(X).to_bytes()
    with pytest.raises(DataError, match=r"shape \[6, 4\]: expected 24 ciphertexts of 512 bytes, got uint8 \[23, 512\]"):
        public.from_bytes(rows[1:], layout)
    with pytest.raises(DataError, match="ciphertext 3 of an encrypted array is not between"):
        public.from_bytes(np.where(np.arange(24)[:, np.newaxis] == 3, np.uint8(255), rows), layout)
    tampered = public.from_bytes(rows, layout)
    tampered._cells[0, 0] = public.encrypt_residues([2**900])[0]
    with pytest.raises(DataError, match="a number is larger than it can be"):
        key().decrypt(tampered)


@pytest.mark.parametrize("fast", [False, True])
def test_phe_reads_what_is_written_here_and_the_other_way_round(fast):
    private = key(2048, fast)
    array = private.public.encrypt(X, scale_bits=15)
    theirs = of_phe(private)
    np.testing.assert_allclose([theirs.decrypt(each) for each in array.to_phe()], X.ravel(), atol=2**-15)
    computed = (array * 3 + 1.0).to_phe()
    np.testing.assert_allclose([theirs.decrypt(each) for each in computed], 3 * X.ravel() + 1, atol=2**-13)
    numbers = [theirs.public_key.encrypt(value) for value in (1.5, -7, 2**70)]
    np.testing.assert_allclose(private.decrypt(private.public.from_phe(numbers) * 2), [3, -14, 2.0**71])
    sums = computed[0] + array.to_phe()[0] * 2
    assert theirs.decrypt(sums) == pytest.approx(5 * X[0, 0] + 1, abs=1e-3)
    with pytest.raises(ConfigError, match="phe has one number in each ciphertext"):
        both(X)[1].to_phe()
    with pytest.raises(ConfigError, match="encrypted for another key"):
        PrivateKey.generate(2048).public.from_phe(numbers)
