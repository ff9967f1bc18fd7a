"""Connections to addresses that were judged first. A name is resolved once, and what was judged is what is used."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
from typing import Self

from loraplex.engines.adapters.sources.base import SOCKET_TIMEOUT_SECONDS, Transfer, TransferStopped
from loraplex.engines.errors import AdapterNotFound, AdapterSourceForbidden, AdapterSourceUnavailable

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def is_public(address: IpAddress) -> bool:
    """Whether an address belongs to the public internet; one that carries an IPv4 address is judged by that."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address.teredo is not None:
            return False
    return address.is_global and not address.is_multicast


def resolve(host: str, port: int, *, allow_private: bool) -> list[str]:
    """The addresses of a host. Raises AdapterSourceForbidden if any is not public, AdapterSourceUnavailable."""
    try:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        if isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN:
            raise AdapterSourceUnavailable(f"the name {host} cannot be resolved right now") from error
        raise AdapterNotFound(f"there is no host {host}") from error
    addresses = list(dict.fromkeys(str(answer[4][0]) for answer in answers))
    for address in addresses:
        if not allow_private and not is_public(ipaddress.ip_address(address.partition("%")[0])):
            raise AdapterSourceForbidden(
                f"{host} leads to {address}, which is not a public address (adapters.https_allow_private)"
            )
    return addresses


class JudgedConnection(http.client.HTTPSConnection):
    """TLS to one of the addresses that `resolve` gave; the certificate must be the host's.

    A context: the transfer watches it until that ends, since an answer is read after `close`, too.
    """

    def __init__(
        self, host: str, port: int, context: ssl.SSLContext, transfer: Transfer, *, allow_private: bool
    ) -> None:
        super().__init__(host, port, timeout=SOCKET_TIMEOUT_SECONDS, context=context)
        self._tls = context
        self._transfer = transfer
        self._addresses = resolve(host, port, allow_private=allow_private)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._transfer.unwatch()

    def connect(self) -> None:
        """Raises AdapterSourceUnavailable, TransferStopped, or AdapterSourceForbidden where the certificate is not
        good."""
        failure: OSError | None = None
        for address in self._addresses:
            self._transfer.check()
            try:
                self.sock = self._secured(socket.create_connection((address, self.port), SOCKET_TIMEOUT_SECONDS))
            except ssl.SSLCertVerificationError as error:
                raise AdapterSourceForbidden(f"{self.host} has no valid certificate: {error.verify_message}") from error
            except OSError as error:
                failure = error
            else:
                return
        raise AdapterSourceUnavailable(f"{self.host} cannot be reached ({type(failure).__name__})") from failure

    def _secured(self, plain: socket.socket) -> ssl.SSLSocket:
        try:
            self._transfer.watch(plain)
            return self._tls.wrap_socket(plain, server_hostname=self.host)
        except (OSError, TransferStopped):
            plain.close()
            raise
