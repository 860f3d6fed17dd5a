"""Certificates for tests: good ones as ``efl certs`` makes them, and such as must be refused."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from efl.cli.certs import Issued, issue, issue_authority
from efl.transport import Tls


class Authority:
    """An authority with a folder for what it issues."""

    def __init__(self, folder: Path, name: str = "the authority") -> None:
        self.folder, self.name = folder, name
        self.issued = issue_authority(10, name)
        self.file = folder / f"{name.replace(' ', '_')}.pem"
        self.file.write_bytes(self.issued.certificate_pem)

    def party(self, name: str, names: Sequence[str] | None = None, peer_name: str = "leader") -> Tls:
        """A good party of this authority."""
        return self.write(name, issue(self.issued, [name] if names is None else names, 10), peer_name)

    def dated(self, name: str, first: float, last: float, peer_name: str = "leader") -> Tls:
        """A party whose certificate is valid from ``first`` to ``last`` days from now."""
        return self.write(f"dated-{name}", odd(name, self.issued, first, last), peer_name)

    def write(self, file: str, party: Issued, peer_name: str = "leader") -> Tls:
        certs, key = self.folder / f"{file}.pem", self.folder / f"{file}.key"
        certs.write_bytes(party.certificate_pem)
        key.touch(0o600)
        key.write_bytes(party.key_pem)
        return Tls(str(certs), str(key), str(self.file), peer_name)


def odd(name: str, authority: Issued | None, first: float = -1, last: float = 10) -> Issued:
    """A certificate without the care of ``issue``: of any time; self-signed where there is no authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if authority is None else authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=first))
        .not_valid_after(now + datetime.timedelta(days=last))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    )
    return Issued(builder.sign(key if authority is None else authority.key, hashes.SHA256()), key)


def expecting(tls: Tls, peer_name: str = "", peer_certs: str | Path = "") -> Tls:
    """The same party, which expects somebody else."""
    return dataclasses.replace(
        tls, peer_name=peer_name or tls.peer_name, peer_certs=str(peer_certs) if peer_certs else tls.peer_certs
    )
