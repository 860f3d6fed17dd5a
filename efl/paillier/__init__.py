"""Paillier encryption of arrays: keys, packing, and sums and products with what is not encrypted.

    private = PrivateKey.generate()
    encrypted = private.public.encrypt(np.array([1.5, -2.0]))
    private.decrypt(encrypted * 3 + 1)        # array([ 5.5, -5. ])

Needs gmpy2 (the extra ``privacy``); no TensorFlow, no network. Keys and ciphertexts are phe's too.
"""

from __future__ import annotations

from efl.paillier.array import EncryptedArray
from efl.paillier.layout import Layout
from efl.paillier.private_key import PrivateKey
from efl.paillier.public_key import PublicKey

__all__ = ["EncryptedArray", "Layout", "PrivateKey", "PublicKey"]
