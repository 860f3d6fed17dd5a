"""The secret from which all noise follows: 32 bytes of the operating system's generator, in a file of their own."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
from pathlib import Path
from typing import NoReturn

from efl.errors import ConfigError

_BYTES = 32


class Seed:
    """A secret. It shows itself in no text and cannot be pickled."""

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        if len(secret) != _BYTES:
            raise ConfigError(f"a seed of {len(secret)} bytes: expected {_BYTES}")
        self._secret = secret

    @classmethod
    def fresh(cls) -> Seed:
        """A new one."""
        return cls(secrets.token_bytes(_BYTES))

    @classmethod
    def load_or_create(cls, path: Path) -> tuple[Seed, bool]:
        """The seed in a file, which is made where there is none.

        Args:
          path: The file; its folder exists.

        Returns:
          (seed, whether it is new).

        Raises:
          ConfigError: Others may read the file, it is not this user's, no regular file, or not of the right size.
        """
        with contextlib.suppress(FileExistsError):
            return cls._create(path), True
        return cls._load(path), False

    @classmethod
    def _create(cls, path: Path) -> Seed:
        seed = cls.fresh()
        draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(handle, seed._secret)
            os.fsync(handle)
        finally:
            os.close(handle)
        try:
            os.link(draft, path)  # fails where another has made one meanwhile
        finally:
            draft.unlink()
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return seed

    @classmethod
    def _load(cls, path: Path) -> Seed:
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError as error:
            raise ConfigError(
                f"the noise seed {path} cannot be opened: {error.strerror}; expected a regular file"
            ) from None
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
                raise ConfigError(f"the noise seed {path} is no regular file of this user's: whose is it?")
            if stat.S_IMODE(found.st_mode) & 0o077:
                raise ConfigError(
                    f"the noise seed {path} can be read by others (mode {stat.S_IMODE(found.st_mode):o}), who could "
                    f"take the noise away: chmod 600 {path}. If others may have read it, delete it; a new one is made"
                )
            secret = os.read(handle, _BYTES + 1)
        finally:
            os.close(handle)
        if len(secret) != _BYTES:
            raise ConfigError(
                f"the noise seed {path} has {found.st_size} bytes, expected {_BYTES}: delete it, and a new one is made"
            )
        return cls(secret)

    def key(self, purpose: bytes, *parts: bytes | memoryview) -> bytes:
        """32 bytes that follow from the seed and some data, and tell nothing of the seed.

        Args:
          purpose: At most 16 bytes; keys of different purposes have nothing to do with each other.
          *parts: The data; how it is cut into parts does not matter.
        """
        digest = hashlib.blake2b(key=self._secret, digest_size=32, person=purpose)
        for part in parts:
            digest.update(part)
        return digest.digest()

    def __repr__(self) -> str:
        return "Seed(<secret>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a seed is a secret and is not pickled")
