"""Which URLs and which addresses may be reached. Pure: nothing is resolved or opened here.

A URL is read once, by the strict grammar below, into a `Target`; what is connected to is made of
the target's fields, so that no second parser can understand the same text differently.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from urllib.parse import unquote

from ..errors import Misconfigured
from .fetch_errors import FetchRefused

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_LONGEST_URL = 8192  # signed addresses of content networks have about 2000 characters
_LONGEST_HOST = 253
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^#]*)")
_UNSAFE = re.compile(r"[\x00-\x20\x7f-\xa0\\\u2028\u2029]")
_PATH = re.compile(r"[!-~]*")
_STRAY = re.compile("%(?![0-9A-Fa-f]{2})")
_ESCAPED = re.compile("%[0-9A-Fa-f]{2}")
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_PORT = re.compile(r"[0-9]{1,5}")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


@dataclass(frozen=True, slots=True)
class Target:
    """Where a request goes. `host` is ASCII in lower case; `path` includes the query, which may be
    secret and is left out of the representation.
    """

    scheme: str
    host: str
    port: int
    path: str = field(repr=False)

    @property
    def origin(self) -> tuple[str, str, int]:
        return (self.scheme, self.host, self.port)

    @property
    def authority(self) -> str:
        """As a Host header has it."""
        return self.host if self.port == 443 else f"{self.host}:{self.port}"

    @property
    def shown(self) -> str:
        """The URL without its query."""
        return f"{self.scheme}://{self.authority}{self.path.partition('?')[0]}"

    @property
    def url(self) -> str:
        """All of it. Not for messages or logs."""
        return f"{self.scheme}://{self.authority}{self.path}"


def check_url(url: str, allowed_hosts: Iterable[str]) -> Target:
    """The URL's parts, if it may be asked for. Raises `FetchRefused` with the reason otherwise.

    Only https, without credentials or a fragment, to a name (never an address) that is allowed:
    `example.org` means itself, `*.example.org` every name below it, and `example.org:8443` another
    port than 443. Names outside ASCII are compared in their IDNA form.
    Raises `Misconfigured` if an entry of `allowed_hosts` is none of these.
    """
    if len(url) > _LONGEST_URL:
        raise FetchRefused(f"the URL has more than {_LONGEST_URL} characters")
    if _UNSAFE.search(url):
        raise FetchRefused("the URL contains a space, a backslash or a control character")
    parts = _URL.fullmatch(url)
    if parts is None:
        complete = "#" not in url
        reason = "is not of the form https://host/path" if complete else "has a fragment (#…)"
        raise FetchRefused(f"the URL {reason}")
    scheme, authority, path = parts.groups()
    if scheme.lower() != "https":
        raise FetchRefused("only https URLs are fetched")
    if "@" in authority:
        raise FetchRefused("the URL contains credentials; give a token by its setting instead")
    if "[" in authority or "]" in authority:
        raise FetchRefused("the URL names an address; only host names are allowed")
    if not _PATH.fullmatch(path):
        raise FetchRefused("the URL's path has characters that must be percent-encoded")
    host, port = _host_and_port(authority)
    if not any(_rule(entry).permits(host, port) for entry in allowed_hosts):
        shown = host if port == 443 else f"{host}:{port}"
        raise FetchRefused(
            f"{shown} is not among the hosts that files may be fetched from: "
            "ShimmyModels.pull_hosts, in Jupyter's configuration, can name further ones"
        )
    return Target("https", host, port, path if path.startswith("/") else f"/{path}")


def decoded(path: str) -> list[str]:
    """Its parts. Raises `FetchRefused` where they are no text."""
    try:
        return [unquote(part, errors="strict") for part in path.split("/")]
    except UnicodeDecodeError:
        raise FetchRefused("the URL has a path that is not UTF-8") from None


def plain_parts(path: str) -> list[str]:
    """Its parts, decoded; only the last may be empty. Raises `FetchRefused` for a path that a server may
    take for another: rules would be asked about the one, and the other would be fetched.
    """
    parts = decoded(path.removeprefix("/"))
    if _STRAY.search(path) or any(_ESCAPED.search(part) for part in parts):
        raise FetchRefused(
            "the URL's path is encoded twice or wrongly: two hex digits come after each %, once"
        )
    if not all(part.isprintable() and set("/\\").isdisjoint(part) for part in parts):
        raise FetchRefused(
            "the URL's path has an encoded slash, backslash or control character: only slashes that "
            "are not encoded stand between its parts"
        )
    # Of a part some servers drop what comes after a semicolon, or dots and blanks at its end.
    inner = parts if parts[-1] else parts[:-1]
    if not all(part.partition(";")[0].strip(" .") for part in inner):
        raise FetchRefused(
            "the URL's path has an empty part, . or .. in it: the shortest path to the file is wanted"
        )
    return parts


def _host_and_port(authority: str) -> tuple[str, int]:
    name, colon, digits = authority.partition(":")
    if not colon:
        return ascii_host(name), 443
    if not _PORT.fullmatch(digits) or not 0 < int(digits) < 65536:
        raise FetchRefused("the URL's port is not a number from 1 to 65535")
    return ascii_host(name), int(digits)


def ascii_host(name: str) -> str:
    """A host's name in the form that is resolved. Raises `FetchRefused` if it is none."""
    host = name.lower() if name.isascii() else _idna(name)
    labels = host.split(".")
    # inet_aton takes 127.1, 2130706433 and 0x7f.1 for addresses: a name's last label is no number.
    if _NUMBER.fullmatch(labels[-1]):
        raise FetchRefused("the URL names an address; only host names are allowed")
    if len(host) > _LONGEST_HOST or not all(_LABEL.fullmatch(label) for label in labels):
        raise FetchRefused("the URL's host is not a valid name")
    if len(labels) < 2:
        raise FetchRefused("the URL's host has no domain; local names are not fetched from")
    return host


def _idna(name: str) -> str:
    import httpx

    try:
        return httpx.URL(scheme="https", host=name).raw_host.decode("ascii").lower()
    except (httpx.InvalidURL, UnicodeError):
        raise FetchRefused("the URL's host is not a valid name") from None


@dataclass(frozen=True, slots=True)
class _Rule:
    host: str
    port: int
    below: bool

    def permits(self, host: str, port: int) -> bool:
        if port != self.port:
            return False
        return host.endswith(f".{self.host}") if self.below else host == self.host


@lru_cache(maxsize=256)
def _rule(entry: str) -> _Rule:
    below = entry.startswith("*.")
    try:
        host, port = _host_and_port(entry.removeprefix("*."))
    except FetchRefused:
        raise Misconfigured(
            f"ShimmyModels.hub or pull_hosts: {entry!r} is neither a host nor *.host, with or "
            "without a port"
        ) from None
    return _Rule(host, port, below)


def check_hosts(allowed_hosts: Iterable[str]) -> tuple[str, ...]:
    """The same entries. Raises `Misconfigured` for one that names no host."""
    entries = tuple(allowed_hosts)
    for entry in entries:
        _rule(entry)
    return entries


# IANA's special-purpose registries as of 2025, by hand: what Python's `is_global` says has changed
# between patch releases.
_IPV4 = [
    (ipaddress.IPv4Network(network), reason)
    for network, reason in (
        ("0.0.0.0/8", "unspecified"),
        ("10.0.0.0/8", "private"),
        ("100.64.0.0/10", "a carrier's private network"),
        ("127.0.0.0/8", "loopback"),
        ("168.63.129.16/32", "a cloud's metadata service"),  # Azure's, in public space
        ("169.254.0.0/16", "link-local"),
        ("172.16.0.0/12", "private"),
        ("192.0.0.0/24", "reserved"),
        ("192.0.2.0/24", "for documentation"),
        ("192.31.196.0/24", "reserved"),
        ("192.52.193.0/24", "reserved"),
        ("192.88.99.0/24", "a 6to4 relay"),
        ("192.168.0.0/16", "private"),
        ("192.175.48.0/24", "reserved"),
        ("198.18.0.0/15", "for benchmarks"),
        ("198.51.100.0/24", "for documentation"),
        ("203.0.113.0/24", "for documentation"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved"),
    )
]
_GLOBAL_IPV6 = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_IPV6 = [
    (ipaddress.IPv6Network(network), reason)
    for network, reason in (
        ("2001::/32", "Teredo"),
        ("2001::/23", "reserved"),  # benchmarks, ORCHID, anycast of protocols
        ("2001:db8::/32", "for documentation"),
        ("2002::/16", "6to4"),
        ("2620:4f:8000::/48", "reserved"),
        ("3ffe::/16", "reserved"),
        ("3fff::/20", "for documentation"),
        # Outside of 2000::/3 as well, here for their reasons:
        ("::/128", "unspecified"),
        ("::1/128", "loopback"),
        ("::ffff:0:0/96", "an IPv4 address in IPv6"),
        ("fc00::/7", "private"),
        ("fe80::/10", "link-local"),
        ("fec0::/10", "site-local"),
        ("ff00::/8", "multicast"),
    )
]
_ISATAP = (b"\x00\x00\x5e\xfe", b"\x02\x00\x5e\xfe")


def refusal(address: str | IPAddress) -> str | None:
    """Why an address may not be connected to; None if it may.

    Only public unicast addresses may. An IPv6 address that carries an IPv4 one is refused as such
    (mapped, compatible, 6to4, Teredo), or judged by it (NAT64's well-known prefix, which is how a
    network without IPv4 reaches public IPv4 servers, and ISATAP). What a network's own NAT64
    prefix translates cannot be seen from the address.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return "not an address"
    if isinstance(ip, ipaddress.IPv4Address):
        return next((reason for network, reason in _IPV4 if ip in network), None)
    if ip.scope_id is not None:
        return "link-local"
    embedded = ipaddress.IPv4Address(ip.packed[12:])
    if ip in _NAT64:
        return refusal(embedded)
    reason = next((reason for network, reason in _IPV6 if ip in network), None)
    if reason or ip not in _GLOBAL_IPV6:
        return reason or "reserved"
    return refusal(embedded) if ip.packed[8:12] in _ISATAP else None


def address_allowed(address: str | IPAddress) -> bool:
    """Whether an address is public unicast; see `refusal`."""
    return refusal(address) is None
