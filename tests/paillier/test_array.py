"""Encrypted arrays, against numpy and phe."""

from __future__ import annotations

import math

import gmpy2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efl.errors import ConfigError, DataError
from efl.paillier import PrivateKey, residues
from efl.paillier.encoding import bound_of, encode
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
    for made in (array + 1, array + array, array * 2, array.sum()):
        one, layout = made.to_bytes()
        two, _ = made.to_bytes()
        assert (one != two).any(-1).all()
        assert made.layout.computed and not layout.computed
        np.testing.assert_array_equal(key().decrypt(public.from_bytes(one, layout)), key().decrypt(made))


def test_operands_cannot_be_read_off_the_ciphertexts_without_a_key():
    public = key().public
    n, square = public.n, public.square
    array = public.encrypt(np.array([5]))
    (original,) = array._cells

    def found(leaving):
        """(factor, number), of which ``leaving`` was made: what remains of the original's power is 1 + n·number."""
        for factor in range(1, 100):
            ratio = leaving * gmpy2.invert(gmpy2.powmod(original, factor, square), square) % square
            if (ratio - 1) % n == 0:
                return factor, (ratio - 1) // n
        return None

    for made, secret in ((array + 4242, (1, 4242)), (array * 73, (73, 0)), (array * 42 + 17, (42, 17))):
        assert found(made._cells[0]) == secret
        assert found(residues.from_rows(made.to_bytes()[0])[0]) is None
        assert found(gmpy2.mpz(made.to_phe()[0].ciphertext(be_secure=False))) is None


@pytest.mark.parametrize("packed", [0, 1])
def test_a_layout_that_leaves_tells_nothing_of_the_operands(packed):
    array, limit_bits = both(X)[packed], 18 if packed else 46
    large, small = RNG.integers(-90, 90, (4, 3)), np.eye(4, 3, dtype=int)
    for one, two in (
        (array * 737, array * 738),
        (array * 737, array * -2),
        (array + 4242, array + 1),
        (array - 4242, array + array),
        (array @ large, array @ small),
        (array.matmul(W, scale_bits=9), array.matmul(W / 9, scale_bits=9)),
        (array * 737, array * 3 + array),
    ):
        assert one.layout != two.layout
        for give in (lambda made: made.to_bytes()[1], lambda made: made.masked().to_bytes()[1]):
            assert give(one) == give(two)
        layouts = [made.to_bytes(limit=2.0**limit_bits)[1] for made in (one, two)]
        assert layouts[0] == layouts[1] and layouts[0].bound == 2 ** (limit_bits + one.scale_bits)
    # What was encrypted alone has the limit of encrypt, which is public.
    assert array.to_bytes()[1] == array.layout and array.layout.bound == 2 ** (19 if packed else 48)


@pytest.mark.parametrize("packed", [0, 1])
def test_a_receiver_computes_as_far_as_the_limit_leaves_room(packed):
    public, sent = key().public, both(X)[packed] * 5
    received = public.from_bytes(*sent.to_bytes(limit=2.0**7 if packed else 2.0**40))
    np.testing.assert_allclose(decrypted(received * 3 + 1.5 - received), 10 * X + 1.5, atol=2e-3)
    again = public.from_bytes(*(received @ np.ones((4, 2), int)).to_bytes())
    np.testing.assert_allclose(decrypted(again), (5 * X) @ np.ones((4, 2)), atol=2e-3)
    for compute in (lambda: again * 2, lambda: again + again, lambda: again + 1):
        with pytest.raises(ConfigError, match="computed by another party, that has to give to_bytes a limit"):
            compute()
    np.testing.assert_allclose(decrypted(-again), -(5 * X) @ np.ones((4, 2)), atol=2e-3)
    less = both(X)[packed].to_bytes(limit=2.0**33 if not packed else 9.0)[1]  # also of what was not computed
    assert less.bound == (2**49 if not packed else 9 * 2**16) and not less.computed
    for limit, message in (
        (39.0 if packed else 2.0**34, r"the numbers could be larger than limit=.* below 2\*\*"),
        (0, "the numbers could be larger than limit=0"),
        (2.0**30 if packed else 2.0**1023 * 1.9, "is more than the ciphertexts can hold" if packed else None),
        (math.inf, "limit=inf: expected the largest magnitude of a number, which is finite"),
        ("8", "limit='8': expected the largest magnitude"),
    ):
        if message is not None:
            with pytest.raises(ConfigError, match=message):
                sent.to_bytes(limit=limit)


UNSIGNED = [np.uint8, np.uint16, np.uint32, np.uint64]


@pytest.mark.parametrize("dtype", [*UNSIGNED, np.int8, np.int64, object, bool])
def test_integers_of_every_type_are_taken_for_what_they_are(dtype):
    array = key().public.encrypt(np.array([10, 20, 30]))
    x = np.array([10, 20, 30], object)
    numbers = np.array([1, 0, 1] if dtype is bool else [1, 2, 3]).astype(dtype)
    plain = np.array([int(each) for each in numbers], object)
    for got, expected in (
        (array - numbers, x - plain),
        (numbers - array, plain - x),
        (array + numbers, x + plain),
        (array * numbers, x * plain),
    ):
        np.testing.assert_array_equal(key().decrypt(got, exact=True), expected)
    row = key().public.encrypt(np.array([[10, 20, 30]]))
    np.testing.assert_array_equal(key().decrypt(row @ numbers[:, np.newaxis], exact=True), [[x @ plain]])


def test_the_ends_of_integers():
    array, x = key().public.encrypt(np.array([[10, -20]])), np.array([[10, -20]], object)
    np.testing.assert_array_equal(decrypted(array - np.array([-128, 127], np.int8)), [[138, -147]])
    for factor in (2**63, -(2**63), 2**64, -(2**200), np.uint64(2**64 - 1), [2**63, -1], np.int64(-(2**63))):
        got = key().decrypt(array * factor, exact=True)
        np.testing.assert_array_equal(got, x * (factor if isinstance(factor, list) else int(factor)))
    for matrix in ([[2**62 - 1], [1 - 2**62]], [[np.uint64(2**61)], [3]], [[True], [False]]):
        whole = np.array([[int(each) for each in row] for row in matrix], object)
        np.testing.assert_array_equal(key().decrypt(array @ matrix, exact=True), x @ whole)
    for matrix in ([[2**62], [0]], [[-(2**62)], [0]], np.array([[2**64 - 1], [0]], np.uint64), [[2**63], [-1]]):
        with pytest.raises(ConfigError, match=r"expected all below 2\*\*62 in magnitude"):
            array @ matrix
    with pytest.raises(ConfigError, match="which one ciphertext cannot hold"):
        array * 2**2100
    for compute in (lambda: array * 2.0, lambda: array * [2**63, 0.5], lambda: array @ np.array([[1.0], [2]], object)):
        with pytest.raises(TypeError, match="of floats say their scale"):
            compute()


def test_nothing_is_computed_that_will_not_fit(monkeypatch: pytest.MonkeyPatch):
    array = key().public.encrypt(X, limit=8.0, pack_axis=0, headroom_bits=2)
    monkeypatch.setattr("efl.paillier.array.powmod", lambda *_: pytest.fail("a power was computed"))
    monkeypatch.setattr("efl.paillier.array.multiexp", lambda *_: pytest.fail("products were computed"))
    for compute in (lambda: array * 9, lambda: array @ np.full((4, 1), 9)):
        with pytest.raises(ConfigError, match="slots of 24 bits cannot hold"):
            compute()


def test_integers_are_encoded_exactly():
    public = key().public
    large = 2**55 + 1
    for values in (
        [large],
        np.array([large]),
        np.array([large], np.uint64),
        np.array([large], object),
        [large, -(2**55)],
    ):
        array = public.encrypt(values, scale_bits=2, limit=2.0**56)
        expected = [4 * int(each) for each in values]
        np.testing.assert_array_equal(key().decrypt(array, exact=True), expected)
    for value in (2**60 + 1, -(2**60) - 1):
        for values in ([value], np.array(value), np.array([value], object)):
            with pytest.raises(DataError, match="1 of 1 values are larger than 1.15292e"):
                public.encrypt(values, limit=2.0**60)
    for limit in (2**61 - 1, 2**60 + 1, np.int64(2**60 + 1)):  # the float is another number, and not a smaller one
        array = public.encrypt([int(limit), -int(limit)], limit=limit)
        np.testing.assert_array_equal(key().decrypt(array, exact=True), [int(limit), -int(limit)])
    np.testing.assert_array_equal(decrypted(public.encrypt([2**61], limit=2**61 - 1)), [2**61])
    clipped = encode([7, -7, 2**70, 2], 2, 2.6, clip=True)
    assert clipped.dtype == np.int64 and clipped.tolist() == [10, -10, 10, 8]
    assert encode(np.array([200, 3], np.uint8), 1, 5.0, clip=True).tolist() == [10, 6]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_what_is_accepted_is_within_the_bound(data):
    scale_bits = data.draw(st.integers(0, 20))
    limit = data.draw(st.floats(1e-3, 2.0 ** (61 - scale_bits), exclude_max=True))
    whole = math.floor(limit)
    near = st.one_of(st.integers(whole - 2, whole + 2), st.floats(limit * 0.999, limit * 1.001))
    kind = data.draw(st.sampled_from([np.asarray, lambda each: np.array(each, object), lambda each: each]))
    value = data.draw(near)
    if isinstance(value, int):
        value = kind([value, -value])
    try:
        made = encode(value, scale_bits, limit)
    except DataError:
        assert max(np.ravel(value).tolist()) > limit
        made = encode(value, scale_bits, limit, clip=True)
    assert made.dtype == np.int64 and int(np.abs(made).max()) <= bound_of(limit, scale_bits)


def test_arrays_of_nothing_go_the_whole_way():
    public = key().public
    for shape, axis in (((0,), None), ((0,), 0), ((3, 0), 0), ((3, 0), 1), ((0, 2), 0), ((0, 2), 1), ((0, 2), None)):
        packing = {} if axis is None else {"pack_axis": axis, "limit": 8.0, "headroom_bits": 20}
        for dtype in (float, int, object):
            array = public.encrypt(np.zeros(shape, dtype), **packing)
            made = array + array - 1
            if len(shape) == 2 and axis != 1:
                made = made @ np.ones((shape[1], 4), int)
            made = made * 3
            for each in (array, made):
                received = public.from_bytes(*each.to_bytes())
                assert decrypted(received).shape == each.shape == decrypted(each).shape
    row = public.encrypt(np.zeros((3, 0)), pack_axis=0, limit=8.0, headroom_bits=20)
    np.testing.assert_array_equal(decrypted(row.sum(1)), np.zeros(3))
    np.testing.assert_array_equal(decrypted(row @ np.zeros((0, 2), int)), np.zeros((3, 2)))


def test_arguments_of_another_kind_are_named():
    public, array = key().public, key().public.encrypt(X)
    packing = {"pack_axis": 0, "limit": 8.0}
    for compute, message in (
        (lambda: array + np.ones(5), r"sum: an encrypted array of shape \[6, 4\] and numbers of shape \[5\]: expected"),
        (lambda: array - np.ones((2, 6, 4)), r"numbers of shape \[2, 6, 4\]: expected a shape that broadcasts"),
        (lambda: array * np.ones(5, int), r"product: an encrypted array of shape \[6, 4\] and numbers of shape \[5\]"),
        (lambda: array * np.ones((1, 6, 4), int), r"numbers of shape \[1, 6, 4\]: expected"),
        (lambda: array.times(np.ones(5), scale_bits=2), "expected a shape that broadcasts"),
        (lambda: public.encrypt(X, limit=np.inf), "encrypt: limit=inf: expected the largest magnitude"),
        (lambda: public.encrypt(X, limit=np.nan), "encrypt: limit=nan: expected the largest magnitude"),
        (lambda: public.encrypt(X, limit="8"), "encrypt: limit='8': expected the largest magnitude"),
        (lambda: public.encrypt(X, limit=10**400), "expected the largest magnitude of a number, which is finite"),
        (lambda: public.from_phe([], limit=np.inf), "from_phe: limit=inf"),
        (lambda: public.encrypt(X, scale_bits=1.5), "encrypt: scale_bits=1.5: expected an integer"),
        (lambda: public.encrypt(X, scale_bits=True), "encrypt: scale_bits=True: expected an integer"),
        (lambda: public.encrypt(X, **packing, headroom_bits=1.5), "headroom_bits=1.5: expected an integer"),
        (lambda: public.encrypt(X, **packing, headroom_bits=-1), "headroom_bits=-1: expected at least 0"),
        (lambda: public.encrypt(X, limit=8.0, headroom_bits=3, pack_axis="0"), "pack_axis='0': expected an integer"),
        (lambda: public.encrypt(X, clip="no"), "clip='no': expected True or False"),
        (lambda: public.encrypt([[1], [2, 3]]), "values of no one shape"),
        (lambda: public.encrypt([None]), "values of dtype object: expected real numbers"),
        (lambda: array - None, "-: values of dtype object: expected real numbers"),
        (lambda: array.sum(None), "sum: axis=None: expected one axis"),
        (lambda: array.sum(0.0), "sum: axis=0.0: expected an integer"),
        (lambda: array.rescale(17.5), "rescale: scale_bits=17.5: expected an integer"),
        (lambda: array.times(X, scale_bits=None), "times: scale_bits=None: expected an integer"),
        (lambda: array.matmul(W, scale_bits=2.0), "matmul: scale_bits=2.0: expected an integer"),
    ):
        with pytest.raises(ConfigError, match=message):
            compute()
    for values in ([2**70], np.array([2**70], object), [2**63, -1]):
        with pytest.raises(DataError, match="encrypt: 1 of . values are larger than 4.29497e"):
            public.encrypt(values)
    huge = public.encrypt([1.5]) * 2**1030
    with pytest.raises(DataError, match=r"larger than a float64 can be: decrypt\(exact=True\) gives the integers"):
        decrypted(huge)
    assert key().decrypt(huge, exact=True).tolist() == [3 * 2**1045]


def test_what_is_computed_from_phes_numbers_hides_multipliers_from_jacobis_symbol():
    for private in (key(), key(2048, True)):
        public = private.public
        theirs = phe.PaillierPublicKey(int(public.n))
        numbers = []
        while len(numbers) < 24:
            number = theirs.encrypt(len(numbers))
            if gmpy2.jacobi(number.ciphertext() % public.n, public.n) == -1:
                numbers.append(number)
        array = public.from_phe(numbers)
        own = public.encrypt(np.arange(24))
        for made, expected in (
            (array * 2, np.arange(24) * 2),
            (array * 3, np.arange(24) * 3),
            (own + array * 2, np.arange(24) * 3),
            (array * 2 - own, np.arange(24)),
        ):
            rows, layout = made.to_bytes()
            # This key's own masks have the symbol 1: it would be the multiplier's parity.
            assert {gmpy2.jacobi(each % public.n, public.n) for each in residues.from_rows(rows)} == {-1, 1}
            np.testing.assert_array_equal(private.decrypt(public.from_bytes(rows, layout)), expected)


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
    times = array * 2**30
    for made in (array + times, times + array):
        asked.clear()
        made.to_bytes()
        assert set(asked) == {1024 + 31 + 1 + 40}


def test_a_message_that_is_none_of_this_layout_is_refused():
    public = key().public
    rows, layout = public.encrypt(X).to_bytes()
    with pytest.raises(DataError, match=r"shape \[6, 4\]: expected 24 ciphertexts of 512 bytes, got uint8 \[23, 512\]"):
        public.from_bytes(rows[1:], layout)
    with pytest.raises(DataError, match="ciphertext 3 of an encrypted array is not between"):
        public.from_bytes(np.where(np.arange(24)[:, np.newaxis] == 3, np.uint8(255), rows), layout)
    theirs = phe.PaillierPublicKey(int(public.n))
    while True:  # none of this key's masks has this symbol
        other = gmpy2.mpz(theirs.raw_encrypt(1))
        if gmpy2.jacobi(other % public.n, public.n) == -1:
            break
    with pytest.raises(DataError, match="ciphertext 23 of an encrypted array was not masked as encryptions under key"):
        public.from_bytes(np.concatenate([rows[:-1], residues.to_rows([other], 512)]), layout)
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
    made = array * 3  # to phe it leaves under fresh masks, as it would to anybody
    one, two = ([number.ciphertext(be_secure=False) for number in made.to_phe()] for _ in range(2))
    assert not set(one) & (set(two) | set(map(int, made._cells.ravel())))
    sums = computed[0] + array.to_phe()[0] * 2
    assert theirs.decrypt(sums) == pytest.approx(5 * X[0, 0] + 1, abs=1e-3)
    with pytest.raises(ConfigError, match="phe has one number in each ciphertext"):
        both(X)[1].to_phe()
    with pytest.raises(ConfigError, match="encrypted for another key"):
        PrivateKey.generate(2048).public.from_phe(numbers)
