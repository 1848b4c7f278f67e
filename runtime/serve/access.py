"""Who may ask: API keys, the names that this server answers to, and other sites whose pages may use it."""

from __future__ import annotations

import hmac
import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

ANY = "*"


@dataclass(frozen=True)
class Access:
    """`keys` are taken as bearer tokens; without keys everyone may ask.

    `hosts` are further names that the Host header may have, `*` for any. Loopback names always may, and IP addresses
    where `addresses` is true. A page of another site whose own name resolves to this machine (DNS rebinding) sends
    that name, and is refused by it.
    `origins` are other sites whose pages may send requests and forms, as scheme://host:port, or `*`.
    """

    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    addresses: bool = False

    @classmethod
    def of_server(cls, bound: str, keys: tuple[str, ...], hosts: tuple[str, ...], origins: tuple[str, ...]) -> Access:
        """That of a server on the address `bound`: beyond loopback it also answers to its addresses and names."""
        if _is_loopback(bound.lower()):
            return cls(keys, hosts, origins)
        return cls(keys, (*hosts, bound.lower(), socket.gethostname().lower()), origins, addresses=True)

    def has_key(self, authorization: str) -> bool:
        """Whether the header is `Bearer KEY` with one of the keys; as quick for a near miss as for any other."""
        scheme, _, given = authorization.partition(" ")
        given = given.strip(" ")
        if not self.keys:
            return True
        if scheme.lower() != "bearer":
            return False
        # headers arrive as Latin-1: curl's bytes are UTF-8, a browser's are Latin-1
        sent = given.encode("latin-1"), given.encode()
        return sum(hmac.compare_digest(token, key.encode()) for token in sent for key in self.keys) > 0

    def has_host(self, header: str | None) -> bool:
        """Whether a Host header names this server. Clients of HTTP/1.0 may send none; browsers always do."""
        if header is None or ANY in self.hosts:
            return True
        name = host_name(header)
        return name in self.hosts or _is_loopback(name) or (self.addresses and _address(name) is not None)

    def has_origin(self, origin: str | None, host: str | None) -> bool:
        """Whether a form may come from a page of that origin: the server's own, or one of `origins`."""
        if origin is None or ANY in self.origins or origin in self.origins:
            return True
        return urlsplit(origin).netloc == host


def host_name(header: str) -> str:
    """The name of a Host header without its port, in lower case; IPv6 addresses without brackets."""
    name = header.strip().lower()
    if name.startswith("["):
        address, closed, _ = name[1:].partition("]")
        return address if closed else name
    return name.partition(":")[0].removesuffix(".")


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _is_loopback(name: str) -> bool:
    address = _address(name)
    if address is not None:
        return address.is_loopback
    return name == "localhost" or name.endswith(".localhost")
