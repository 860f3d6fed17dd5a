"""``efl keygen``: a pair of keys for encrypted layers."""

from __future__ import annotations

from pathlib import Path
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
    "Paillier's scheme does: that elements of a subgroup of 512 bits cannot be told from others.",
)
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path(),
    help="Where the files go.  [default: the working folder]",
)
@click.option("--force", is_flag=True, help="Replace keys that are there. What was encrypted for them is lost.")
@click.option(
    "--show",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Make nothing; print the fingerprint of the key in this file.",
)
def keygen(bits: int, fast: bool, folder: Path, force: bool, show: Path | None) -> None:
    """Make the keys of encrypted layers: public_key.json and private_key.json.

    The follower runs it, keeps private_key.json (readable by its owner only) and gives public_key.json to the leader.
    Both compare the fingerprint over another channel: whoever could put a key of their own in its place would read all.
    """
    try:
        if show is not None:
            click.echo(describe(load(show)))
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
      ConfigError: A file is there and ``force`` is False, it cannot be written, or ``bits`` are out of range.
    """
    paillier = _library()
    files = folder / PRIVATE_FILE, folder / PUBLIC_FILE
    for file in files:
        if file.exists() and not force:  # before the work, and before either is touched
            raise ConfigError(
                f"{file} is there already, and what was encrypted for a key is lost with it: --force replaces both "
                "files, --folder names another place"
            )
    private = paillier.PrivateKey.generate(bits, fast)
    # In this order: a public key without its private one could be given away and used. A pair of which only one file
    # was replaced is refused by the layers that read both.
    private.save(files[0], overwrite=force)
    private.public.save(files[1], overwrite=force)
    return private


def load(file: Path) -> PublicKey:
    """The public key of a key file of either kind.

    Raises:
      ConfigError: It is none.
    """
    paillier = _library()
    try:
        return paillier.PublicKey.load(file)
    except ConfigError as error:
        try:
            return paillier.PrivateKey.load(file).public
        except ConfigError as other:
            raise (other if "public kind" not in str(other) else error) from None


def describe(public: PublicKey) -> str:
    """One line for people to compare."""
    kind = {"djn": "", "subgroup": ", with masks from a subgroup", "": ", not made by efl"}[public.kind]
    return f"public key of {public.bits} bits{kind}, fingerprint: {public.fingerprint}"


def _library():  # type: ignore[no-untyped-def]  # a module
    try:
        import efl.paillier as paillier
    except ImportError as error:
        raise ConfigError(f"keys need {error.name}, of the extra 'privacy': pip install 'efl[privacy]'") from None
    return paillier
