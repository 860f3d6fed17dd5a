"""Powers with a secret exponent: by Python's OpenSSL, and by gmpy2 where there is none."""

from __future__ import annotations

import gc
import random
import sys
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from gmpy2 import mpz, powmod

from efl.paillier import PrivateKey, modular
from efl.paillier.modular import SecretExponent
from tests.paillier.keypairs import key

needs_openssl = pytest.mark.skipif(modular.openssl() is None, reason="this Python keeps OpenSSL's functions to itself")


@pytest.fixture
def without_openssl(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Python is built without OpenSSL."""
    monkeypatch.setitem(sys.modules, "_hashlib", None)
    modular.openssl.cache_clear()
    yield
    monkeypatch.undo()
    modular.openssl.cache_clear()


@pytest.mark.parametrize("bits", [3, 64, 1000, 2047, 4096])
def test_powers_are_those_of_python(bits: int) -> None:
    rng = random.Random(bits)
    modulus = rng.getrandbits(bits) | 1 | 1 << (bits - 1)
    exponent = rng.getrandbits(max(bits // 2, 2)) | 1
    bases = [0, 1, modulus - 1, modulus, modulus + 2, 5 * modulus**2, *(rng.randrange(modulus) for _ in range(5))]
    found = SecretExponent(mpz(exponent), mpz(modulus)).powers([mpz(base) for base in bases])
    assert found == [pow(base, exponent, modulus) for base in bases]


@needs_openssl
def test_openssl_computes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modular, "powmod_base_list", lambda *_: pytest.fail("by gmpy2"))
    private = key()
    again = PrivateKey(*(half.prime for half in private._whole), private.public)
    assert again.decrypt_residues(private.public.encrypt_residues([5, -1])) == [5, private.public.n - 1]


@pytest.mark.usefixtures("without_openssl")
@pytest.mark.parametrize("fast", [False, True])
def test_a_key_decrypts_where_there_is_no_openssl(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    assert modular.openssl() is None
    private = key(2048, fast)
    again = PrivateKey(*(half.prime for half in private._whole), private.public, private._orders)
    assert again.decrypt_residues(private.public.encrypt_residues([5, -1])) == [5, private.public.n - 1]


def test_an_openssl_without_such_functions_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import _struct

    # Python's own module of another name: a library that loads, and has none of them.
    monkeypatch.setitem(sys.modules, "_hashlib", types.SimpleNamespace(__file__=getattr(_struct, "__file__", "")))
    modular.openssl.cache_clear()
    try:
        assert modular.openssl() is None
    finally:
        monkeypatch.undo()
        modular.openssl.cache_clear()


def test_threads_share_an_exponent_and_it_is_freed_with_its_last_user() -> None:
    rng = random.Random(1)
    modulus, exponent = mpz(rng.getrandbits(2048) | 1), mpz(rng.getrandbits(1024))
    bases = [[mpz(rng.getrandbits(2048)) for _ in range(8)] for _ in range(16)]
    with ThreadPoolExecutor(4) as pool:
        shared = SecretExponent(exponent, modulus)
        found = list(pool.map(shared.powers, bases))
        del shared
        gc.collect()
    assert found == [[powmod(base, exponent, modulus) for base in each] for each in bases]
