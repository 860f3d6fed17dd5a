"""Keys: made, checked, written and read, also by phe; numbers encrypted and decrypted."""

from __future__ import annotations

import json
import logging
import pickle
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import gmpy2
import pytest

from efl.errors import ConfigError, DataError
from efl.paillier import PrivateKey, PublicKey, key_files
from tests.paillier.keypairs import key

phe = pytest.importorskip("phe")
KINDS = [(2048, False), (2048, True), (3072, False)]


def of_phe(private: PrivateKey) -> phe.PaillierPrivateKey:
    p, q = (int(half.prime) for half in private._whole)
    return phe.PaillierPrivateKey(phe.PaillierPublicKey(p * q), p, q)


@pytest.mark.parametrize(("bits", "fast"), KINDS)
def test_a_key_has_the_form_that_its_masks_need(bits: int, fast: bool) -> None:
    private = key(bits, fast)
    p, q = (half.prime for half in private._whole)
    assert private.public.bits == bits == (p * q).bit_length()
    assert p % 4 == q % 4 == 3 and gmpy2.gcd(p - 1, q - 1) == 2
    assert all(gmpy2.is_prime(prime, 40) for prime in (p, q))
    assert abs(p - q).bit_length() > bits // 2 - 100


@pytest.mark.parametrize(("bits", "fast"), KINDS)
def test_numbers_come_back(bits: int, fast: bool) -> None:
    private = key(bits, fast)
    n = private.public.n
    numbers = [0, 1, 2**64, n // 2, n - 1, -1, n + 5]
    ciphertexts = private.public.encrypt_residues(numbers)
    assert private.decrypt_residues(ciphertexts) == [number % n for number in numbers]
    assert of_phe(private).raw_decrypt(int(ciphertexts[2])) == 2**64
    theirs = phe.PaillierPublicKey(int(n)).raw_encrypt(4711)
    assert private.decrypt_residues([gmpy2.mpz(theirs)]) == [4711]  # its mask is in no subgroup


def test_no_two_encryptions_are_alike_and_all_masks_have_jacobi_symbol_one() -> None:
    public = key().public
    ciphertexts = public.encrypt_residues([7] * 50)
    assert len(set(ciphertexts)) == 50
    assert {gmpy2.jacobi(each % public.n, public.n) for each in ciphertexts} == {1}


def test_masks_have_exponents_of_the_length_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = __import__("secrets").randbits
    monkeypatch.setattr("efl.paillier.masks.secrets.randbits", lambda bits: asked.append(bits) or real(bits))
    masks = key().public.masks
    for bits in (None, 100, 1136, 2088):
        masks.draw(bits)
    assert asked == [1024, 1024, 1136, 2088]
    key(2048, True).public.masks.draw()
    assert asked[-1] == 640


@pytest.mark.parametrize(("bits", "fast"), KINDS[:2])
def test_files_are_read_again_and_by_phe(tmp_path: Path, bits: int, fast: bool) -> None:
    private = key(bits, fast)
    private.save(tmp_path / "private_key.json")
    private.public.save(tmp_path / "public_key.json")
    assert stat.S_IMODE((tmp_path / "private_key.json").stat().st_mode) == 0o600
    public = PublicKey.load(tmp_path / "public_key.json")
    assert public == private.public and public.fingerprint == private.public.fingerprint
    ciphertexts = public.encrypt_residues([42])
    assert PrivateKey.load(tmp_path / "private_key.json").decrypt_residues(ciphertexts) == [42]
    # phe's own command line, as its users have it.
    pheutil = [sys.executable, "-m", "phe.command_line"]
    run = [*pheutil, "encrypt", "--output", "number.json", "public_key.json", "--", "-2.5"]
    code = "import sys; from phe.command_line import cli; sys.argv[0] = 'pheutil'; cli()"
    run[1:3] = ["-c", code]
    subprocess.run(run, cwd=tmp_path, check=True, capture_output=True)
    back = [sys.executable, "-c", code, "decrypt", "private_key.json", "number.json"]
    done = subprocess.run(back, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "-2.5" in done.stdout
    number = json.loads((tmp_path / "number.json").read_text())
    assert private.decrypt_residues([gmpy2.mpz(number["v"])]) == [(-(5 * 16**32) // 2) % private.public.n]


def test_keys_of_phe_are_read_and_their_masks_are_slow(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    code = "import sys; from phe.command_line import cli; cli()"
    for run in (["genpkey", "private.json"], ["extract", "private.json", "public.json"]):
        subprocess.run([sys.executable, "-c", code, *run], cwd=tmp_path, check=True, capture_output=True)
    public = PublicKey.load(tmp_path / "public.json")
    with caplog.at_level(logging.WARNING, "efl"):
        (ciphertext,) = public.encrypt_residues([5])
        assert PrivateKey.load(tmp_path / "private.json").decrypt_residues([ciphertext]) == [5]
    assert "was not made by efl: every encryption takes a full-length exponent" in caplog.text
    assert "the private key may be read by others" in caplog.text  # phe leaves it so


def test_nothing_is_overwritten_unless_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "public_key.json"
    key().public.save(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="there is a file already, .*overwrite=True"):
        key(2048, True).public.save(path)
    assert path.read_bytes() == before
    key(2048, True).public.save(path, overwrite=True)
    assert PublicKey.load(path) == key(2048, True).public
    assert [each.name for each in tmp_path.iterdir()] == ["public_key.json"]


def test_the_wrong_file_is_named(tmp_path: Path) -> None:
    key().save(tmp_path / "private")
    key().public.save(tmp_path / "public")
    (tmp_path / "none").write_text("{}")
    (tmp_path / "large").write_text(" " * 70_000)
    for load, name, message in (
        (PublicKey.load, "private", "a key of the private kind; expected the public key"),
        (PrivateKey.load, "public", "a key of the public kind; expected the private key"),
        (PublicKey.load, "missing", r"the public key cannot be read \(No such file"),
        (PublicKey.load, "none", "no Paillier key file"),
        (PublicKey.load, "large", "larger than 65536 bytes"),
    ):
        with pytest.raises(ConfigError, match=f"{name}: .*{message}"):
            load(tmp_path / name)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f.pop("pub"), "'pub' is missing"),
        (lambda f: f.pop("p"), "'p' is missing or no number"),
        (lambda f: f.update(p="a b"), "'p' is missing or no number"),
        (lambda f: f.update(p=f["q"]), "p and q are not the two primes"),
        (lambda f: f["pub"].update(n=f["p"]), "Paillier key of 1024 bits: expected 2048 to 8192"),
        (lambda f: f["pub"].update(masks="short"), "masks='short': expected 'djn', 'subgroup'"),
    ],
)
def test_a_damaged_private_key_is_refused(tmp_path: Path, spoil, message: str) -> None:
    key().save(tmp_path / "key")
    fields = json.loads((tmp_path / "key").read_text())
    spoil(fields)
    (tmp_path / "key").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=message):
        PrivateKey.load(tmp_path / "key")


def iter_primes(start: int = 3 << 1022) -> Iterator[gmpy2.mpz]:
    prime = gmpy2.mpz(start)
    while True:
        prime = gmpy2.next_prime(prime)
        yield prime


def test_numbers_that_are_no_keys_are_refused() -> None:
    n = key().public.n
    prime = gmpy2.next_prime(gmpy2.mpz(1) << 2047)
    for bad, message in (
        (n >> 1024, "of 1024 bits"),
        (n * n * n * n * n, "of 10[0-9]+ bits"),
        (n + 1, "a prime factor below 65536"),
        (n * 65521, "a prime factor below 65536"),
        (prime, "n is a prime, or a power"),
        (gmpy2.next_prime(gmpy2.mpz(1) << 1024) ** 2, "n is a prime, or a power"),
    ):
        with pytest.raises(ConfigError, match=message):
            PublicKey(bad)
    one, three = (next(p for p in iter_primes() if p % 4 == rest) for rest in (1, 3))
    with pytest.raises(ConfigError, match="n is not a product of two primes that are 3 mod 4"):
        PublicKey(one * three, "djn")
    with pytest.raises(ConfigError, match="h generates no masks"):
        PublicKey(n, "subgroup", 1)
    with pytest.raises(ConfigError, match="bits=1024: expected an even number from 2048 to 8192"):
        PrivateKey.generate(1024)


def two_primes(
    fits: Callable[[gmpy2.mpz], bool], also: Callable[[gmpy2.mpz], bool] | None = None
) -> tuple[gmpy2.mpz, gmpy2.mpz]:
    """Primes far from each other."""
    return next(filter(fits, iter_primes())), next(filter(also or fits, iter_primes(7 << 1021)))


def test_keys_whose_primes_others_could_find_are_refused(tmp_path: Path) -> None:
    short = gmpy2.mpz(65539)
    long = next(p for p in iter_primes(3 << 2030) if p % 4 == 3 and gmpy2.gcd(p - 1, short - 1) == 2)
    near = next(p for p in iter_primes() if p % 4 == 3)
    next_to_it = next(p for p in iter_primes(near) if p % 4 == 3 and gmpy2.gcd(p - 1, near - 1) == 2)
    path = tmp_path / "private_key.json"
    key().save(path)
    fields = json.loads(path.read_text())
    for p, q, message in (
        (short, long, "one of its primes has 17 bits, where n has 2048: expected half as many"),
        (near, next_to_it, "its primes are so near to each other that the root of n tells both"),
    ):
        for masks in ("djn", ""):
            for one, two in ((p, q), (q, p)):
                with pytest.raises(ConfigError, match=f"private key: {message}; .*Make new keys with `efl keygen`"):
                    PrivateKey(one, two, PublicKey(p * q, masks))
        names = {name: key_files.number_to_text(each) for name, each in (("p", p), ("q", q))}
        pub = {**fields["pub"], "n": key_files.number_to_text(p * q)}
        path.write_text(json.dumps({**fields, **names, "pub": pub}))
        with pytest.raises(ConfigError, match=f"private_key.json: private key: {message}"):
            PrivateKey.load(path)


@pytest.mark.parametrize("fits", [lambda p: p % 4 == 1, lambda p: p % 12 == 7], ids=["1 mod 4", "a common factor"])
def test_primes_of_another_form_than_short_masks_need_are_refused(fits: Callable[[gmpy2.mpz], bool]) -> None:
    p, q = two_primes(fits)
    with pytest.raises(ConfigError, match="not of the form that its public key's masks need.* `efl keygen`"):
        PrivateKey(p, q, PublicKey(p * q, "djn"))
    assert PrivateKey(p, q, PublicKey(p * q)).public.bits == 2048  # whose masks are of full length


def test_masks_of_a_small_order_are_refused() -> None:
    p, q = two_primes(lambda p: p % 12 == 7, lambda q: q % 28 == 15)
    n = p * q
    h = -gmpy2.powmod(2, 2 * ((p - 1) // 6) * ((q - 1) // 14), n) % n
    with pytest.raises(ConfigError, match="not two primes of 256 bits; .* `efl keygen`"):
        PrivateKey(p, q, PublicKey(n, "subgroup", h), (3, 7))


def test_numbers_of_another_kind_are_refused() -> None:
    n = int(key().public.n)
    with pytest.raises(ConfigError, match="n is not positive"):
        PublicKey(-n)
    for bad in ("abc", str(n), 2.0**1023, None, True):
        with pytest.raises(
            ConfigError, match=f"n is of type {type(bad).__name__}: expected an integer; PublicKey.load"
        ):
            PublicKey(bad)
    with pytest.raises(ConfigError, match="h is of type str: expected an integer"):
        PublicKey(n, "subgroup", "5")
    with pytest.raises(ConfigError, match="p is of type str: expected an integer"):
        PrivateKey("3", 5, key().public)
    for bits in (2048.0, "2048", None, True):
        with pytest.raises(ConfigError, match=f"PrivateKey.generate: bits={bits!r}: expected an integer"):
            PrivateKey.generate(bits)


def test_ciphertexts_that_are_none_are_refused() -> None:
    private = key()
    public, (p, _) = private.public, (half.prime for half in private._whole)
    good = public.encrypt_residues([1])[0]
    for bad, message in (
        (0, "not between 0 and n²"),
        (public.square, "not between"),
        (p * 5, "is no encryption under"),
    ):
        with pytest.raises(DataError, match=f"ciphertext 1 of .*{message}"):
            private.decrypt_residues([good, gmpy2.mpz(bad)])
    # One that is masked in another way shows the parity of what it is raised to in its Jacobi symbol.
    odd = next(c for c in map(gmpy2.mpz, iter(lambda: phe.PaillierPublicKey(int(public.n)).raw_encrypt(1), None))
               if gmpy2.jacobi(c % public.n, public.n) == -1)  # fmt: skip
    public.check_ciphertexts([odd], "the peer")
    with pytest.raises(DataError, match="was not masked as encryptions under key"):
        public.check_ciphertexts([odd], "the peer", of_efl=True)


def test_a_private_key_does_not_show_itself() -> None:
    private = key()
    secret = str(private._whole[0].prime)
    assert secret not in repr(private) and secret not in str(vars(private)["public"])
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(private)


@pytest.mark.parametrize("operations", [5, "decrypt", None, {}])
def test_a_file_whose_kind_is_nonsense_is_told(tmp_path: Path, operations: object) -> None:
    path = tmp_path / "private_key.json"
    key().save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "key_ops": operations}))
    with pytest.raises(ConfigError, match="of the unknown kind; expected the private key"):
        PrivateKey.load(path)


@pytest.mark.parametrize("order", ["AA", "p"])
def test_orders_of_a_subgroup_that_cannot_be(tmp_path: Path, order: str) -> None:
    path = tmp_path / "private_key.json"
    key(2048, True).save(path)
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "a": fields["p"] if order == "p" else order}))
    with pytest.raises(ConfigError, match="the orders of its masks are not those"):
        PrivateKey.load(path)
