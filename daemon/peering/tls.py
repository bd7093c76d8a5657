"""TLS contexts: 1.3 only, trust in the mesh's root alone.

Host names mean nothing in a mesh, so none are checked: a peer is its node id, which stands in its
certificate, and the caller compares that after the handshake.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """A member's key and certificate chain (PEM files that only this user can read), and the root (DER)."""

    key_file: Path
    certificate_file: Path
    root_der: bytes


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """For accepting: a client certificate must hold under the root; without one a client is a stranger."""
    context = _context(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_OPTIONAL
    context.num_tickets = 0  # connections stay open; a resumption would only skip the certificate check
    context.load_verify_locations(cadata=files.root_der)
    load_certificate(context, files)
    return context


def client_context(files: TlsFiles) -> ssl.SSLContext:
    """For dialling as a member."""
    context = stranger_context(files.root_der)
    load_certificate(context, files)
    return context


def load_certificate(context: ssl.SSLContext, files: TlsFiles) -> None:
    """Show what the files hold now on connections made from now on; those that are up keep what they showed."""
    context.load_cert_chain(files.certificate_file, files.key_file)


def stranger_context(root_der: bytes) -> ssl.SSLContext:
    """For dialling without a certificate, to a mesh whose root is known."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=root_der)
    return context


def unverified_context() -> ssl.SSLContext:
    """For fetching a root certificate that is then compared with a token. Never send a secret through it."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.maximum_version = ssl.TLSVersion.TLSv1_3
    return context
