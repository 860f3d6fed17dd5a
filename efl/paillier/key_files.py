"""Keys as files: JSON, as phe's command line reads and writes it, with what our keys have beside that.

    {"kty": "DAJ", "alg": "PAI-GN1", "key_ops": ["encrypt"], "n": …, "kid": …, "masks": "djn"}
    {"kty": "DAJ", "key_ops": ["decrypt"], "p": …, "q": …, "pub": {…}, "kid": …}

Numbers are base64url, big-endian. phe takes no notice of ``masks`` (nor of ``h``, ``a`` and ``b``, which keys with
masks from a subgroup have).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import json
import logging
import os
import secrets
import stat
from pathlib import Path
from typing import Any

from gmpy2 import mpz

from efl.errors import ConfigError

_log = logging.getLogger("efl")
_LARGEST_FILE = 1 << 16
_LARGEST_NUMBER_BITS = 1 << 14
PUBLIC, PRIVATE = "encrypt", "decrypt"
_NO_LINKS = (errno.EPERM, errno.ENOTSUP)
_KINDS = {PUBLIC: "public", PRIVATE: "private"}


def number_to_text(number: int) -> str:
    """A number as a key file has it."""
    held = int(number)
    return base64.urlsafe_b64encode(held.to_bytes((held.bit_length() + 7) // 8 or 1, "big")).decode().rstrip("=")


def number_of(fields: dict[str, Any], name: str, where: str) -> mpz:
    """A number from a key file.

    Raises:
      ConfigError: It is missing, or none.
    """
    text = fields.get(name)
    try:
        if not isinstance(text, str) or not 0 < len(text) <= _LARGEST_NUMBER_BITS // 6:
            raise ValueError
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (ValueError, binascii.Error):
        raise ConfigError(f"{where}: {name!r} is missing or no number in base64url: the file is damaged") from None
    return mpz(int.from_bytes(data, "big"))


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], str]:
    """The fields of a key file.

    Args:
      path: The file.
      kind: ``PUBLIC`` or ``PRIVATE``, which is expected.

    Returns:
      (fields, name of the file for messages).

    Raises:
      ConfigError: It is missing, too large, no JSON, no key, or the other kind of key.
    """
    where = str(path)
    try:
        with open(path, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise ConfigError(
            f"{where}: the {_KINDS[kind]} key cannot be read ({error.strerror or error}). The party that makes keys "
            "gives public_key.json to the other, and keeps private_key.json"
        ) from None
    if len(text) > _LARGEST_FILE:
        raise ConfigError(f"{where}: larger than {_LARGEST_FILE} bytes: no key file")
    try:
        fields = json.loads(text)
        if not isinstance(fields, dict) or fields.get("kty") != "DAJ":
            raise ValueError
    except (ValueError, RecursionError):
        raise ConfigError(f"{where}: no Paillier key file (JSON with kty 'DAJ' was expected): damaged?") from None
    operations = fields.get("key_ops")
    operations = operations if isinstance(operations, list) else []
    if kind not in operations:
        other = next((_KINDS[each] for each in _KINDS if each in operations), "unknown")
        raise ConfigError(f"{where}: this is a key of the {other} kind; expected the {_KINDS[kind]} key")
    if kind == PRIVATE and os.name == "posix" and mode & 0o077:
        _log.warning(
            "%s: the private key may be read by others (mode %o): chmod 600 it; who has read it can read all that was "
            "encrypted for it",
            where,
            mode,
        )
    return fields, where


def write(path: str | os.PathLike[str], fields: dict[str, Any], kind: str, overwrite: bool) -> None:
    """Writes a key file whole or not at all; a private one is readable by its owner only, from its first byte on.

    Raises:
      ConfigError: There is such a file, and ``overwrite`` is False, or it cannot be written.
    """
    target = Path(path)
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if kind == PRIVATE else 0o644)
        with os.fdopen(handle, "w") as file:
            json.dump(fields, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            os.replace(draft, target)
        else:
            os.link(draft, target)  # fails where there is one, also one that was made meanwhile
        _synchronise(target.parent)
    except FileExistsError:
        raise ConfigError(
            f"{target}: there is a file already, and what was encrypted for a key is lost with it; give another place, "
            "or overwrite=True to replace it"
        ) from None
    except OSError as error:
        more = ": this file system has no hard links? Write it to another" if error.errno in _NO_LINKS else ""
        raise ConfigError(f"{target}: the key cannot be written ({error.strerror or error}){more}") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(draft)


def _synchronise(folder: Path) -> None:
    """Makes a rename outlive a power cut."""
    with contextlib.suppress(OSError):  # some file systems cannot
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
