"""``efl keygen``: a pair of keys for encrypted layers."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import click

from efl.errors import ConfigError

if TYPE_CHECKING:
    from efl.paillier import PrivateKey, PublicKey

PUBLIC_FILE, PRIVATE_FILE = "public_key.json", "private_key.json"


@click.command()
@click.option("--bits", type=int, default=3072, show_default=True, help="Of the modulus: 2048 to 8192, even.")
@click.option(
    "--fast",
    is_flag=True,
    help="Masks from a subgroup: encryption in two thirds of the time, decryption in a quarter. It assumes more than "
    "Paillier's scheme does: that random elements of a subgroup, of an order of 512 bits, cannot be told from random "
    "n-th powers; and the other party trusts the maker of the key that it was made so.",
)
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    help="Where the files go; made if it is not there.  [default: the working folder]",
)
@click.option("--force", is_flag=True, help="Replace keys that are there. What was encrypted for them is lost.")
@click.option(
    "--show",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Make nothing; print size, kind and fingerprint of the public or private key in this file.",
)
def keygen(bits: int, fast: bool, folder: Path, force: bool, show: Path | None) -> None:
    """Make the keys of encrypted layers: public_key.json and private_key.json.

    The follower runs it, keeps private_key.json (readable by its owner only) and gives public_key.json to the leader.
    Both compare the fingerprint over another channel: whoever could put a key of their own in its place would read all.
    """
    try:
        if show is not None:
            click.echo(f"{show}: {describe(load(show))}")
            return
        private = generate(folder, bits, fast, force)
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    click.echo(
        f"{describe(private.public)}\n"
        f"{folder / PUBLIC_FILE}: give it to the leader, who compares what `efl keygen --show` prints there\n"
        f"{folder / PRIVATE_FILE}: keep it here; whoever has it can decrypt all that is encrypted for this pair"
    )


def generate(folder: Path, bits: int, fast: bool, force: bool) -> PrivateKey:
    """Makes a pair of keys and writes both files.

    Args:
      folder: Where they go.
      bits: Of the modulus.
      fast: See ``PrivateKey.generate``.
      force: Whether to replace what is there.

    Returns:
      The private key.

    Raises:
      ConfigError: The folder cannot be made; a file is there and ``force`` is False; it cannot be written; ``bits`` are
        out of range.
    """
    paillier = _library()
    private_file, public_file = folder / PRIVATE_FILE, folder / PUBLIC_FILE
    # Before the work, and before either is touched. Links that lead nowhere count: they would stop the second write.
    there = [str(file) for file in (public_file, private_file) if os.path.lexists(file)]
    if there and not force:
        raise ConfigError(
            f"{' and '.join(there)}: there already, and what was encrypted for a key is lost with it. --force replaces "
            "both files, --folder names another place"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made ({error.strerror or error}): give another --folder") from None
    private: PrivateKey = paillier.PrivateKey.generate(bits, fast)
    # In this order, the old public key away first, whatever ends this between two steps leaves a private key alone: no
    # pair that does not match, and no public key to give away that nobody can decrypt for. The file that is missing is
    # noticed by whoever looks for it, and the one that is there by the next call.
    try:
        if force:  # and not one that another call has made meanwhile
            public_file.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{public_file}: cannot be replaced ({error.strerror or error})") from None
    private.save(private_file, overwrite=force)
    private.public.save(public_file, overwrite=force)
    return private


def load(file: Path) -> PublicKey | PrivateKey:
    """The key of a file of either kind.

    Raises:
      ConfigError: It is none.
    """
    paillier = _library()
    from efl.paillier import key_files  # which needs gmpy2

    try:
        key_files.read(file, key_files.PUBLIC)
    except ConfigError:
        return paillier.PrivateKey.load(file)
    return paillier.PublicKey.load(file)


def describe(key: PublicKey | PrivateKey) -> str:
    """One line for people to compare."""
    from efl.paillier import PrivateKey

    which, public = ("private", key.public) if isinstance(key, PrivateKey) else ("public", key)
    masks = {"djn": "masks by short exponents", "subgroup": "masks from a subgroup", "": "not made by efl"}[public.kind]
    return f"{which} key of {public.bits} bits, {masks}, fingerprint: {public.fingerprint}"


def _library() -> ModuleType:
    try:
        import efl.paillier as paillier
    except ImportError as error:
        raise ConfigError(
            f"keys need {error.name}, of the extra 'privacy': pip install '.[privacy]' in efl's sources"
        ) from None
    return paillier
