"""Messages of a peer that sends what it likes: refused with an error that names layer and message, and nobody waits."""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any

import gmpy2
import numpy as np
import pytest

from efl.errors import DataError, EflError
from efl.paillier.engine import Engine
from efl.paillier.scheme import PublicPaillier
from efl.protocol import Kind, PassiveLayer, Widths
from efl.protocol.products import products_of
from efl.protocol.rounds import HEAD_BYTES, first_share
from tests.paillier.keypairs import key
from tests.protocol.pair import Line, Pair, Step

NAME = "third"
Change = Callable[[np.ndarray], np.ndarray]


def pair_of(kind: Kind, momentum: float = 0.0) -> Pair:
    weights = np.full((3, 2), 0.5) if kind is Kind.DENSE else np.ones(3)
    pair = Pair(key(), kind, weights, momentum=momentum, name=NAME)
    scheme, shape = pair.passive._scheme, (kind, 3, weights.shape[-1])
    pair.passive = PassiveLayer(scheme, *shape, learning_rate=pair.rate, momentum=momentum, name=NAME)
    return pair


def step(pair: Pair, changes: dict[str, Change], x: Any = None, dy: Any = None) -> Step:
    outputs = 2 if pair.kind is Kind.DENSE else 3
    x = np.ones((4, 3)) if x is None else x
    return pair.step(x, np.full((4, outputs), 0.01) if dy is None else dy, changes)


def refused(found: Step, whose: str, *texts: str, kind: type[Exception] = DataError) -> None:
    """One party refuses, the other hears that it has gone; none has waited in vain."""
    error = found.errors[whose]
    assert isinstance(error, kind) and isinstance(error, EflError), repr(error)
    assert all(text in str(error) for text in (NAME, *texts)), str(error)
    assert not any(isinstance(each, queue.Empty) for each in found.errors.values())
    assert found.shares is None


def number(value: int) -> Change:
    """The first row is this number."""

    def change(rows: np.ndarray) -> np.ndarray:
        rows[0] = np.frombuffer(int(value).to_bytes(rows.shape[1], "little"), np.uint8)
        return rows

    return change


def not_of_efl() -> int:
    """An encryption of zero whose mask has Jacobi symbol -1."""
    public = key().public
    twisted = next(x for x in range(2, 100) if gmpy2.jacobi(x, public.n) == -1)
    return int(gmpy2.powmod(twisted, public.n, public.square))


CIPHERTEXTS: dict[str, tuple[Change, str]] = {
    "dtype": (lambda rows: rows.view(np.int8), "expected "),
    "floats": (lambda rows: rows.astype(np.float64), "expected "),
    "one less": (lambda rows: rows[:-1], "expected "),
    "one more": (lambda rows: np.concatenate([rows, rows[:1]]), "expected "),
    "none": (lambda rows: rows[:0], "expected "),
    "flat": (lambda rows: rows.ravel(), "expected "),
    "shorter": (lambda rows: rows[:, :-1], "expected "),
    "of a larger key": (lambda rows: np.concatenate([rows, rows], 1), "expected "),
    "zero": (number(0), "is not between 0 and n²"),
    "all ones": (number((1 << 4096) - 1), "is not between 0 and n²"),
    "n": (lambda rows: number(int(key().public.n))(rows), "is no encryption under key"),
    "7 p": (lambda rows: number(7 * int(key()._whole[0].prime))(rows), "is no encryption under key"),
    "q²": (lambda rows: number(int(key()._whole[1].prime) ** 2)(rows), "is no encryption under key"),
}


# All cases of two messages, one of either party's; two cases of the others.
CASES = [
    (kind, name, case)
    for kind in Kind
    for name in ("xc", "xr", "u", "zc", "dw", "dx")
    for case in CIPHERTEXTS
    if case in ("one more", "7 p") or (kind is Kind.DENSE and name in ("xr", "dx"))
]


@pytest.mark.parametrize(("kind", "name", "case"), CASES)
def test_what_are_no_ciphertexts(kind: Kind, name: str, case: str) -> None:
    change, text = CIPHERTEXTS[case]
    leader = name in ("zc", "dw", "dx")
    found = step(pair_of(kind), {name: change})
    refused(
        found, "follower" if leader else "leader", f"{NAME}/{name} of the {'leader' if leader else 'follower'}", text
    )


@pytest.mark.parametrize("name", ["xc", "xr", "u"])
def test_masks_that_are_not_efls_are_refused_by_who_computes(name: str) -> None:
    """The masks of what is computed would show the parity of multipliers: the square root is not in their group."""
    found = step(pair_of(Kind.DENSE), {name: lambda rows: number(not_of_efl())(rows)})
    refused(found, "leader", f"{NAME}/{name} of the follower", "was not masked as encryptions under key")


def encrypted(values: np.ndarray, pair: Pair, what: str) -> Change:
    """Ciphertexts of numbers that no honest party has."""
    scheme = pair.active._scheme
    outputs = 2 if pair.kind is Kind.DENSE else 3
    made = products_of(scheme, Widths(pair.kind, 3, outputs, 4))
    rows = scheme.encrypt(scheme.pack(values, made.updates if what == "dw" else made.gradients))
    return lambda _: rows


def shift_of() -> int:
    return Widths(Kind.DENSE, 3, 2, 4).update_shift


def test_plaintexts_at_random_are_refused() -> None:
    """What a leader makes that has another key's product, or a share of another run without its tag."""
    for name in ("dw", "dx"):
        pair = pair_of(Kind.DENSE)
        scheme = pair.active._scheme
        change = lambda rows: scheme.encrypt(scheme.uniform(1, len(rows)))  # noqa: B023, E731
        refused(step(pair, {name: change}), "follower", f"{NAME}/{name} of the leader", "decrypted numbers are beyond")


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("bits", [64, 63, 62])
def test_an_update_that_no_share_explains_is_refused(bits: int, momentum: float) -> None:
    """V' - V is below 2^62 in magnitude. Shares that grew beyond 63 bits would wrap around in silence."""
    pair = pair_of(Kind.DENSE, momentum)
    bad = np.full((3, 2), (1 << bits + shift_of()) + (1 << 60), object)
    refused(step(pair, {"dw": encrypted(bad, pair, "dw")}), "follower", f"{NAME}/dw of the leader")


def test_a_gradient_in_the_guard_is_refused() -> None:
    pair = pair_of(Kind.DENSE)
    bound = Widths(Kind.DENSE, 3, 2, 4).input_gradient_bound
    bad = np.full((3, 4), 2 * bound + 2)
    offset = np.asarray(pair.follower.values).sum(1)[:, np.newaxis] << 13
    change = encrypted(bad.astype(object) + offset, pair, "dx")
    refused(step(pair, {"dx": change}), "follower", f"{NAME}/dx of the leader", "decrypted numbers are beyond")


@pytest.mark.parametrize("kind", list(Kind))
def test_outputs_that_cannot_be(kind: Kind) -> None:
    cases: list[tuple[Change, str]] = [
        (lambda rows: rows.astype(np.int32), "expected "),
        (lambda rows: rows[1:], "expected "),
        (lambda rows: np.concatenate([rows, rows]), "expected "),
        (lambda rows: np.full_like(rows, 255), "decrypted numbers are beyond"),  # beyond n
        (lambda rows: rows * 0, "decrypted numbers are beyond"),
        (lambda rows: rows[::-1], "decrypted numbers are beyond"),  # each under another's mask
    ]
    for change, text in cases:
        refused(step(pair_of(kind), {"zp": change}), "leader", f"{NAME}/zp of the follower", text)


@pytest.mark.parametrize("name", ["origin", "scale"])
@pytest.mark.parametrize(
    "value",
    [
        np.array(201, np.int64), np.array(-(1 << 63), np.int64), np.array([1], np.int64), np.array(1, np.int32),
        np.array(1.0), np.array(np.nan), np.zeros(0, np.int64), np.array(1, np.uint64),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be(name: str, value: np.ndarray) -> None:
    found = step(pair_of(Kind.DENSE), {name: lambda _: value})
    refused(found, "follower", f"{NAME}/{name} of the leader", "expected one integer within")


def head(rows: int, tag: bytes = bytes(32)) -> np.ndarray:
    return np.frombuffer(rows.to_bytes(8, "little") + tag, np.uint8)


def alone(messages: dict[str, np.ndarray], batch: int | None) -> Exception:
    """What a leader says to a follower that sends just this."""
    come: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for each in messages.items():
        come.put(each)
    come.put((None, None))
    scheme = PublicPaillier(Engine(key().public, workers=0))
    layer = PassiveLayer(scheme, Kind.DENSE, 3, 2, learning_rate=0.1, name=NAME)
    with pytest.raises(DataError) as raised:
        layer.forward(Line(queue.SimpleQueue(), come), first_share(np.ones((3, 2))), batch)
    return raised.value


@pytest.mark.parametrize("rows", [0, (1 << 20) + 1, 1 << 40, (1 << 64) - 1])
def test_batches_that_cannot_be(rows: int) -> None:
    error = alone({"head": head(rows)}, None)
    assert isinstance(error, DataError) and f"{NAME}/head of the follower: a batch of {rows} rows" in str(error)
    error = alone({"head": head(rows)}, 4)
    assert isinstance(error, DataError) and NAME in str(error) and f"{rows} rows and the leader's 4" in str(error)


def test_a_batch_that_the_ciphertexts_do_not_bear_out() -> None:
    """The largest that there can be: its size is compared before anything of that size is made."""
    rows = key().public.encrypt_residues([0] * 3)
    sent = np.stack([np.frombuffer(int(each).to_bytes(512, "little"), np.uint8) for each in rows])
    error = alone({"head": head(1 << 20), "xc": sent}, None)
    assert isinstance(error, DataError) and f"{NAME}/xc of the follower: expected " in str(error)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros(HEAD_BYTES + 1, np.uint8), np.zeros(0, np.uint8), np.zeros((1, HEAD_BYTES), np.uint8),
        np.zeros(HEAD_BYTES, np.int8), np.zeros(HEAD_BYTES, np.float64),
    ],
)  # fmt: skip
def test_heads_that_are_none(bad: np.ndarray) -> None:
    error = alone({"head": bad}, 4)
    assert isinstance(error, DataError) and f"{NAME}/head of the follower" in str(error)


def test_the_tag_of_another_share() -> None:
    for tag in (bytes(31) + b"\1", b"\x80" + bytes(31), bytes(range(32))):
        error = alone({"head": head(4, tag)}, 4)
        assert (
            isinstance(error, DataError)
            and NAME in str(error)
            and "shares of its weights are not of one another" in str(error)
        )


@pytest.mark.parametrize("kind", list(Kind))
def test_after_an_update_that_only_one_party_made_the_next_step_is_refused(kind: Kind) -> None:
    pair = pair_of(kind)
    found = step(pair, {})
    assert found.shares is not None
    pair.follower = pair_of(kind).follower  # as it was before: a restored checkpoint
    refused(step(pair, {}), "leader", "shares of its weights are not of one another")


def test_a_message_that_was_changed_on_its_way_is_found_out_at_the_next_step() -> None:
    """The tag hashes what each party has seen of ``dw``: another one, of valid ciphertexts, leaves other shares."""
    pair = pair_of(Kind.DENSE)
    public = key().public

    def added(rows: np.ndarray) -> np.ndarray:  # another encryption of the same
        first = int.from_bytes(rows[0].tobytes(), "little")
        return number(int(first * public.encrypt_residues([0])[0] % public.square))(rows)

    assert not step(pair, {"dw": added}).errors
    assert np.abs(pair.weights - 0.5).max() < 0.1  # the update itself was right
    refused(step(pair, {}), "leader", "shares of its weights are not of one another")


# ---- what a party is given by its own program


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize(
    ("x", "text", "error"),
    [
        (np.full((4, 3), np.nan), "12 of 12 values are NaN or infinite", DataError),
        (np.array([[1.0, -np.inf, 0.0]] * 4), "4 of 12 values are NaN or infinite", DataError),
        (np.full((4, 3), np.nextafter(32.0, 33.0)), "12 of 12 values are larger than 32", DataError),
        (np.full((4, 3), -1e300), "let the layers before it keep them smaller", DataError),
        (np.full((4, 3), 40, np.int8), "12 of 12 values are larger than 32", DataError),
        (np.zeros((4, 2)), "expected [batch, 3]", DataError),
        (np.zeros((0, 3)), "the batch has no rows", DataError),
        (np.zeros(3), "expected [batch, 3]", DataError),
        (np.full((4, 3), "1"), "expected real numbers", EflError),
        (np.full((4, 3), 1j), "expected real numbers", EflError),
    ],
)
def test_inputs_that_cannot_be(kind: Kind, x: np.ndarray, text: str, error: type[Exception]) -> None:
    found = step(pair_of(kind), {}, x)
    refused(found, "follower", text, kind=error)
    assert not {"head", "xc", "xr", "u"} & set(found.sent)  # refused before anything was sent


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300, "columns", "axes"])
def test_gradients_that_cannot_be(kind: Kind, value: float | str) -> None:
    dy, text = np.full((4, 2 if kind is Kind.DENSE else 3), 0.01), "of its output's gradient are NaN or infinite"
    if isinstance(value, str):
        dy = dy[:, :1] if value == "columns" else dy[0]
        text = f"its output's gradient is {list(dy.shape)}: expected [batch, "
    else:
        dy[2, 1] = value
        text = text if not np.isfinite(value) else "numbers of its output's gradient are beyond 2^200"
    pair = pair_of(kind)
    before = pair.leader, pair.follower
    found = step(pair, {}, dy=dy)
    refused(found, "leader", text)
    assert not {"dw", "dx", "scale"} & set(found.sent)
    assert (pair.leader, pair.follower) == before
    assert not step(pair, {}).errors  # and the next step is taken


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e15, 8.5, -8.5])
def test_first_weights_that_cannot_be(value: float) -> None:
    with pytest.raises(DataError, match=r"1 of 4 initial weights are NaN or beyond ±8"):
        first_share(np.array([[0.5, value], [8.0, -8.0]]))


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (np.outer(np.arange(1, 5), [0.3, 0.1, 0.7]), "its inputs have 1 independent columns and it has 2 units"),
        (np.arange(12).reshape(4, 3) ** 2 % 7 / 64, "its inputs are multiples of 1/64, as raw features are"),
        (np.random.default_rng(0).normal(size=(4, 3)), ""),
    ],
    ids=["rank", "raw", "neither"],
)
def test_what_a_batch_shows_is_warned_of_once(x: np.ndarray, text: str, caplog: pytest.LogCaptureFixture) -> None:
    pair = pair_of(Kind.DENSE)
    for _ in range(2):
        assert not step(pair, {}, x).errors
    told = [each for each in caplog.messages if "its inputs" in each]
    assert len(told) == (1 if text else 0) and all(text in each for each in told), told
