"""Certificates: read, checked, and given to gRPC. Both parties show one, and both look at the name in the other's.

What a peer learns of it: this party's certificate, which is public, and that it holds its key.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import ssl
import stat
from collections.abc import Callable
from typing import NamedTuple

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import NameOID

from efl.errors import ConfigError
from efl.transport.limits import Endpoint, Tls

_log = logging.getLogger("efl")
_DER, _PEM = serialization.Encoding.DER, serialization.Encoding.PEM
_SPKI = serialization.PublicFormat.SubjectPublicKeyInfo
_warned: set[str] = set()


class Material(NamedTuple):
    """What the files hold."""

    chain: bytes
    key: bytes
    roots: bytes
    leaf: x509.Certificate


def load(tls: Tls) -> Material:
    """Reads the three files and checks what can be checked without the peer.

    Args:
      tls: Which files.

    Returns:
      Their contents.

    Raises:
      ConfigError: A file is missing, cannot be read or does not hold what it should, the key is not the certificate's,
        or this party's certificate is not valid today.
    """
    chain, key, roots = (
        _read("my_certs", tls.my_certs),
        _read("my_key", tls.my_key),
        _read("peer_certs", tls.peer_certs),
    )
    leaf = _certificates("my_certs", tls.my_certs, chain)[0]
    _check_key(tls, key, leaf)
    _warn_if_shared(tls.my_key)
    wrong = out_of_date(leaf)
    if wrong:
        raise ConfigError(f"my_certs={tls.my_certs!r}: this party's own certificate {wrong}")
    authorities = _certificates("peer_certs", tls.peer_certs, roots)
    if all(map(out_of_date, authorities)):
        raise ConfigError(f"peer_certs={tls.peer_certs!r}: its certificate {out_of_date(authorities[0])}")
    return Material(chain, key, roots, leaf)


def _read(name: str, path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise ConfigError(f"{name}={path!r}: there is no such file") from None
    except OSError as error:
        raise ConfigError(f"{name}={path!r}: cannot be read ({error.strerror})") from None


def _certificates(name: str, path: str, pem: bytes) -> list[x509.Certificate]:
    with contextlib.suppress(ValueError):
        certificates = x509.load_pem_x509_certificates(pem)
        if certificates:
            return certificates
    raise ConfigError(f"{name}={path!r}: holds no certificate in PEM form (-----BEGIN CERTIFICATE-----)")


def _check_key(tls: Tls, pem: bytes, leaf: x509.Certificate) -> None:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except TypeError:
        raise ConfigError(
            f"my_key={tls.my_key!r}: the key is encrypted with a passphrase, which nobody could type in at each start; "
            "expected one without, in a file that only its owner may read"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(
            f"my_key={tls.my_key!r}: holds no private key in PEM form (-----BEGIN PRIVATE KEY-----)"
        ) from None
    if key.public_key().public_bytes(_DER, _SPKI) != leaf.public_key().public_bytes(_DER, _SPKI):
        raise ConfigError(
            f"my_key={tls.my_key!r} is not the key of the (first) certificate in my_certs={tls.my_certs!r}"
        )


def _warn_if_shared(path: str) -> None:
    if path not in _warned and os.stat(path).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        _warned.add(path)
        _log.warning("my_key=%r: others on this machine may read or change this private key; chmod 600 %s", path, path)


# ---- certificates in words


def out_of_date(certificate: x509.Certificate) -> str:
    """Why a certificate is not valid now, as the end of a sentence; '' where it is."""
    now = datetime.datetime.now(datetime.timezone.utc)
    if now > certificate.not_valid_after_utc:
        return f"expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    if now < certificate.not_valid_before_utc:
        begin = certificate.not_valid_before_utc
        return f"is not valid before {begin:%Y-%m-%d %H:%M} UTC; is the clock of this machine right?"
    return ""


def names_in(certificate: x509.Certificate) -> list[str]:
    """DNS names and IP addresses that a certificate was issued for."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    except ValueError:  # duplicate or malformed extensions
        return []
    return [*found.get_values_for_type(x509.DNSName), *map(str, found.get_values_for_type(x509.IPAddress))]


def issuer_of(certificate: x509.Certificate) -> str:
    """Who issued a certificate, in words."""
    if certificate.issuer == certificate.subject:
        return "itself (self-signed)"
    common = certificate.issuer.get_attributes_for_oid(NameOID.COMMON_NAME)
    return repr(str(common[0].value)[:100] if common else certificate.issuer.rfc4514_string()[:100])


def wrong_name(certificate: x509.Certificate, expected: str) -> str:
    """Why a certificate is not of whom was expected; '' where it is."""
    names = names_in(certificate)
    if expected.lower() in (name.lower() for name in names):
        return ""
    carried = f"the names {names[:10]}" if names else "no name (no subjectAltName)"
    return f"its certificate carries {carried[:500]}, expected {expected!r} (peer_name)"


# ---- for gRPC


def channel_credentials(tls: Tls) -> grpc.ChannelCredentials:
    """Credentials of the side that dials, from the files as they are now.

    Raises:
      ConfigError: See ``load``.
    """
    own = load(tls)
    return grpc.ssl_channel_credentials(own.roots, own.key, own.chain)


def server_credentials(endpoint: Endpoint, tls: Tls, on_connection: Callable[[], None]) -> grpc.ServerCredentials:
    """Credentials of the side that listens. gRPC asks for the files at every connection that is made.

    Args:
      endpoint: Whose.
      tls: Which files.
      on_connection: Called when a connection was made, before its handshake: the only word that gRPC gives of it.

    Raises:
      ConfigError: See ``load``.
    """
    last = load(tls)

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal last
        on_connection()
        try:
            new = load(tls)
        except ConfigError as error:  # a file in the middle of its renewal, perhaps
            _log.warning("%s: goes on with the certificates that it had read before: %s", endpoint.role, error)
            return None
        if new[:3] == last[:3]:
            return None
        last = new
        return _configuration(new)

    return grpc.dynamic_ssl_server_credentials(_configuration(last), renewed, require_client_authentication=True)


def _configuration(own: Material) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(own.key, own.chain)], own.roots)


def stranger(context: grpc.ServicerContext, tls: Tls) -> str:
    """Why the peer of a call that arrived is not the one that was expected; '' where it is."""
    pem = context.auth_context().get("x509_pem_cert")
    if not pem:
        return "it showed no certificate"
    return wrong_name(x509.load_pem_x509_certificate(pem[0]), tls.peer_name)


# ---- for Python's ssl, which says why where gRPC says UNAVAILABLE


def client_context(tls: Tls) -> ssl.SSLContext:
    """As gRPC dials: own certificate, the peer's authority and name."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, tls)


def server_context(tls: Tls) -> ssl.SSLContext:
    """As gRPC listens: own certificate, and the peer must show one of its authority's."""
    return _context(ssl.PROTOCOL_TLS_SERVER, tls)


def blind_context(tls: Tls | None) -> ssl.SSLContext:
    """Takes any certificate: for looking at it, never for talking."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if tls is not None:
        context.load_cert_chain(tls.my_certs, tls.my_key)
    return context


def _context(protocol: ssl._SSLMethod, tls: Tls) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # as gRPC does: peer_certs may be the certificate itself
    context.load_cert_chain(tls.my_certs, tls.my_key)
    context.load_verify_locations(tls.peer_certs)
    context.set_alpn_protocols(["h2"])
    return context
