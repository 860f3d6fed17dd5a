"""``efl certs``: certificates to try an encrypted connection with, from an authority made for the purpose."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import click
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from rich.console import Console

from efl.errors import ConfigError
from efl.settings import DEFAULT_ADDRESS, ROLES

AUTHORITY = "authority"
MY_CERTS, MY_KEY, PEER_CERTS = "my_certs.pem", "my_key.pem", "peer_certs.pem"
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*")
_CLOCKS = datetime.timedelta(minutes=5)  # by which the parties' clocks may differ
_PEM = serialization.Encoding.PEM


class Issued(NamedTuple):
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def certificate_pem(self) -> bytes:
        """The certificate as it stands in a file."""
        return self.certificate.public_bytes(_PEM)

    @property
    def key_pem(self) -> bytes:
        """The key as it stands in a file, without a passphrase."""
        return self.key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


@click.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("certs"),
    show_default=True,
    help="Folder to write to; it is made, for its owner alone.",
)
@click.option("--days", type=click.IntRange(1, 3650), default=90, show_default=True, help="How long they are valid.")
@click.option("--name", "names", multiple=True, default=ROLES, show_default=True, help="A party; once for each.")
@click.option("--force", is_flag=True, help="Overwrite what an earlier call has written.")
def certs(out: Path, days: int, names: Sequence[str], force: bool) -> None:
    """Make certificates for an encrypted connection, for development.

    Makes a private authority and one certificate for each party, by default the leader and the follower, each in a
    folder of its own, with the options that the parties' programs are then started with. In production each party
    makes its own key and has it signed: a key that somebody else has made is known to somebody else.
    """
    try:
        write(out, names, days, force)
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"valid for {days} days, of an authority whose key is [bold]{out / AUTHORITY / MY_KEY}[/bold]\n")
    for name in names:
        console.print(f"[bold]{name}[/bold]")
        console.print(f"  {command_line(out, name, names)}\n", markup=False)
    console.print(
        "Give each party its own folder and nothing else. Whoever has the authority's key can be anybody: keep it away "
        "from both, or delete it. For production each party makes its own key: docs/security.md"
    )


def write(out: Path, names: Sequence[str] = ROLES, days: int = 90, force: bool = False) -> None:
    """Makes an authority and a certificate for each party, and writes them.

    Args:
      out: Folder. In it ``authority`` gets the authority, and each party's folder ``my_certs.pem``, ``my_key.pem`` and
        ``peer_certs.pem``.
      names: The parties: DNS names, which their certificates carry.
      days: How long they are valid.
      force: Whether to overwrite files.

    Raises:
      ConfigError: A name that cannot stand in a certificate, a file that is there already, or a folder that cannot be
        written.
    """
    for name in names:
        if not _NAME.fullmatch(name) or name == AUTHORITY:
            raise ConfigError(f"--name={name!r}: expected a DNS name such as leader or bank.example, not {AUTHORITY!r}")
    if len(set(names)) != len(names):
        raise ConfigError(f"the names {list(names)}: expected each once")
    authority = issue_authority(days)
    files = {(AUTHORITY, MY_KEY): authority.key_pem, (AUTHORITY, PEER_CERTS): authority.certificate_pem}
    for name in names:
        party = issue(authority, [name], days)
        files[name, MY_CERTS], files[name, MY_KEY] = party.certificate_pem, party.key_pem
        files[name, PEER_CERTS] = authority.certificate_pem
    there = [str(out / folder / file) for folder, file in files if os.path.lexists(out / folder / file)]
    if there and not force:
        raise ConfigError(f"{', '.join(there)}: there already; --force overwrites, and the old ones are no good then")
    try:
        for (folder, file), content in files.items():
            _make_folder(out)
            _make_folder(out / folder)
            _write(out / folder / file, content, 0o600 if file == MY_KEY else 0o644)
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be written ({error.strerror})") from None


def _make_folder(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


def _write(path: Path, content: bytes, mode: int) -> None:
    """Writes a file that nobody else can read for a moment first, or put a link in the place of."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)


def issue_authority(days: int, name: str = "efl development authority") -> Issued:
    """Makes an authority that can issue certificates of parties, but no authorities.

    Args:
      days: How long it is valid.
      name: What it is called.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = _builder(subject, subject, key, days).add_extension(x509.BasicConstraints(True, 0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    return Issued(builder.sign(key, hashes.SHA256()), key)


def issue(authority: Issued, names: Sequence[str], days: int) -> Issued:
    """Makes a party's key, and a certificate for it.

    Args:
      authority: Who signs it.
      names: DNS names that it carries.
      days: How long it is valid.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    both_ends = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = (
        _builder(subject, authority.certificate.subject, key, days)
        .add_extension(x509.BasicConstraints(False, None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(both_ends), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
        .add_extension(issuer, critical=False)
    )
    return Issued(builder.sign(authority.key, hashes.SHA256()), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def command_line(out: Path, name: str, names: Sequence[str]) -> str:
    """How a party's program is started with what ``write`` has written for it."""
    role = name if name in ROLES else "ROLE"
    others = [other for other in names if other != name]
    peer = others[0] if len(others) == 1 else "PEER"
    address = {"leader": f" --local_addr={DEFAULT_ADDRESS}", "follower": f" --peer_addr={DEFAULT_ADDRESS}"}
    files = " ".join(f"--{file.partition('.')[0]}={out / name / file}" for file in (MY_CERTS, MY_KEY, PEER_CERTS))
    expected = "" if peer in ROLES and role in ROLES else f" --peer_name={peer}"
    script = f"{role}.py" if role in ROLES else "PROGRAM.py"
    return f"python {script} --federal_role={role}{address.get(role, '')} {files}{expected}"
