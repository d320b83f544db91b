"""Which URLs and addresses may be reached. Cases:

URLs: the allowed host; another; a name that only ends like an allowed one; below and above a
`*.` entry; upper case; IDNA in either spelling, and look-alikes; ports: 443 said and unsaid, allowed,
not allowed, 0, 65536, empty, signs and other digits; every scheme but https; credentials; IP
literals in all spellings that a resolver takes; trailing dot, empty label, no label, too long;
backslash, tab, newline, NUL, space, non-breaking space, line separator; non-ASCII in the path; a
fragment; no path, only a query; longest URL and one more. Entries that are no hosts. The query is in
no representation or message.

Addresses: every special range at both ends, and what lies just beyond; IPv4 in every IPv6 wrapping;
scopes; not addresses.
"""

from __future__ import annotations

import ipaddress

import pytest

from shimmy_jupyter.errors import Misconfigured
from shimmy_jupyter.models.addresses import (
    Target,
    address_allowed,
    check_hosts,
    check_url,
    refusal,
)
from shimmy_jupyter.models.fetch_errors import FetchRefused

HOSTS = ("huggingface.co", "*.hf.co", "mirror.example.org:8443", "bücher.example.org")


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("https://huggingface.co/a/b", Target("https", "huggingface.co", 443, "/a/b")),
        ("https://huggingface.co:443/a", Target("https", "huggingface.co", 443, "/a")),
        ("HTTPS://HuggingFace.CO/A", Target("https", "huggingface.co", 443, "/A")),
        ("https://huggingface.co", Target("https", "huggingface.co", 443, "/")),
        ("https://huggingface.co?a=b", Target("https", "huggingface.co", 443, "/?a=b")),
        (
            "https://huggingface.co/@a:b?c=d@e",
            Target("https", "huggingface.co", 443, "/@a:b?c=d@e"),
        ),
        ("https://cdn.hf.co/", Target("https", "cdn.hf.co", 443, "/")),
        ("https://a.b.hf.co/", Target("https", "a.b.hf.co", 443, "/")),
        ("https://mirror.example.org:8443/", Target("https", "mirror.example.org", 8443, "/")),
        ("https://bücher.example.org/", Target("https", "xn--bcher-kva.example.org", 443, "/")),
        ("https://BÜCHER.example.org/", Target("https", "xn--bcher-kva.example.org", 443, "/")),
        (
            "https://xn--bcher-kva.example.org/",
            Target("https", "xn--bcher-kva.example.org", 443, "/"),
        ),
        (
            "https://huggingface.co/" + "a" * (8192 - 23),
            Target("https", "huggingface.co", 443, "/" + "a" * (8192 - 23)),
        ),
    ],
)
def test_allowed_urls(url: str, target: Target) -> None:
    assert check_url(url, HOSTS) == target


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("https://example.org/", "not among"),
        ("https://evilhuggingface.co/", "not among"),
        ("https://huggingface.co.evil.org/", "not among"),
        ("https://sub.huggingface.co/", "not among"),
        ("https://hf.co/", "not among"),
        ("https://evilhf.co/", "not among"),
        ("https://huggingface.co:8443/", "not among"),
        ("https://mirror.example.org/", "not among"),
        ("https://cdn.hf.co:8443/", "not among"),
        ("https://huggіngface.co/", "not among"),  # with a Cyrillic і
        ("https://huggingface。co.evil.org/", "not among"),
        ("https://huggingface.co:0/", "port"),
        ("https://huggingface.co:65536/", "port"),
        ("https://huggingface.co:/", "port"),
        ("https://huggingface.co:+443/", "port"),
        ("https://huggingface.co:٤٤٣/", "port"),
        ("https://huggingface.co:443:443/", "port"),
        ("http://huggingface.co/", "only https"),
        ("ftp://huggingface.co/", "only https"),
        ("file:///etc/passwd", "only https"),
        ("file://huggingface.co/etc/passwd", "only https"),
        ("data:text/plain,x", "form"),
        ("https:huggingface.co/", "form"),
        ("//huggingface.co/", "form"),
        ("huggingface.co/a", "form"),
        ("", "form"),
        ("https://huggingface.co/a#b", "fragment"),
        ("https://user:s3cret@huggingface.co/", "credentials"),
        ("https://huggingface.co@evil.org/", "credentials"),
        ("https://@huggingface.co/", "credentials"),
        ("https://127.0.0.1/", "address"),
        ("https://127.1/", "address"),
        ("https://2130706433/", "address"),
        ("https://0x7f000001/", "address"),
        ("https://0x7f.1/", "address"),
        ("https://0177.0.0.1/", "address"),
        ("https://0x/", "address"),
        ("https://8.8.8.8/", "address"),
        ("https://[::1]/", "address"),
        ("https://[::ffff:127.0.0.1]/", "address"),
        ("https://[huggingface.co]/", "address"),
        ("https://１２７.０.０.１/", "valid name"),
        ("https://huggingface.co./", "valid name"),
        ("https://huggingface..co/", "valid name"),
        ("https://.huggingface.co/", "valid name"),
        ("https://-huggingface.co/", "valid name"),
        ("https://hugging_face.co/", "valid name"),
        ("https://%68uggingface.co/", "valid name"),
        ("https:///a", "valid name"),
        ("https://" + "a" * 64 + ".hf.co/", "valid name"),
        ("https://" + "a." * 130 + "hf.co/", "valid name"),
        ("https://localhost/", "no domain"),
        ("https://metadata/", "no domain"),
        ("https://huggingface.co\\@evil.org/", "backslash"),
        ("https://huggingface.co/a b", "space"),
        ("https://huggingface.co/\ta", "control"),
        ("https://hugging\nface.co/", "control"),
        ("https://huggingface.co/\x00", "control"),
        ("https://huggingface.co/\x85", "control"),
        ("https://huggingface.co/\u00a0", "control"),
        ("https://huggingface.co/\u2028", "control"),
        (" https://huggingface.co/", "control"),
        ("https://huggingface.co/ä", "percent-encoded"),
        ("https://huggingface.co/?ä", "percent-encoded"),
        ("https://huggingface.co/" + "a" * (8192 - 22), "8192"),
    ],
)
def test_refused_urls(url: str, why: str) -> None:
    with pytest.raises(FetchRefused, match=why) as caught:
        check_url(url, HOSTS)
    assert "s3cret" not in caught.value.message


def test_nothing_is_allowed_by_nothing() -> None:
    with pytest.raises(FetchRefused):
        check_url("https://huggingface.co/", ())


@pytest.mark.parametrize(
    "entry",
    ["", "*", "*.", "*.co", "co", "https://hf.co", "hf.co/", "hf.co:", "hf.co:x", "*.*.hf.co",
     "127.0.0.1", "[::1]", "a@hf.co", "hf.co.", "evil*.hf.co"],
)  # fmt: skip
def test_entries_that_name_no_host(entry: str) -> None:
    with pytest.raises(Misconfigured, match=r"pull_hosts: .* is neither a host"):
        check_hosts(["hf.co", entry])


def test_a_query_is_shown_nowhere() -> None:
    target = check_url("https://mirror.example.org:8443/a?X-Signature=s3cret", HOSTS)
    assert "s3cret" not in repr(target)
    assert target.shown == "https://mirror.example.org:8443/a"
    assert target.url == "https://mirror.example.org:8443/a?X-Signature=s3cret"
    assert target.authority == "mirror.example.org:8443"


ALLOWED = """
1.0.0.1 1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0
168.63.129.15 168.63.129.17 169.253.255.255 169.255.0.0 172.15.255.255 172.32.0.0 192.0.1.0
192.0.3.0 192.167.255.255 192.169.0.0 198.17.255.255 198.20.0.0 198.51.99.255 198.51.101.0
203.0.112.255 203.0.114.0 223.255.255.255
2000:: 2001:200:: 2606:4700:4700::1111 2a00:1450:4001:81b::200e 2001:db7:ffff::1 2001:db9::1
3fff:1000::1 64:ff9b::8.8.8.8 2a00:1450::5efe:8.8.8.8
""".split()
REFUSED = """
0.0.0.0 0.255.255.255 10.0.0.0 10.255.255.255 100.64.0.0 100.100.100.200 100.127.255.255 127.0.0.0
127.0.0.1 127.255.255.255 168.63.129.16 169.254.0.0 169.254.169.254 169.254.255.255 172.16.0.0
172.31.255.255 192.0.0.0 192.0.0.192 192.0.0.255 192.0.2.1 192.31.196.1 192.52.193.1 192.88.99.1
192.168.0.0 192.168.255.255 192.175.48.1 198.18.0.0 198.19.255.255 198.51.100.1 203.0.113.1
224.0.0.0 239.255.255.255 240.0.0.0 255.255.255.255
:: ::1 ::2 ::127.0.0.1 ::8.8.8.8 ::ffff:127.0.0.1 ::ffff:8.8.8.8 ::ffff:0:127.0.0.1
::ffff:0:8.8.8.8 100::1 64:ff9b::127.0.0.1 64:ff9b::169.254.169.254 64:ff9b::10.0.0.1
64:ff9b:1::8.8.8.8 64:ff9b:1::7f00:1 1fff:ffff::1 4000::1 5f00::1
2001::1 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:2::1 2001:10::1 2001:20::1 2001:1ff:ffff::1
2001:db8::1 2002:7f00:1::1 2002:808:808::1 2620:4f:8000::1 3ffe::1 3fff::1 3fff:fff:ffff::1
2a00:1450::5efe:127.0.0.1 2a00:1450::200:5efe:10.0.0.1
fc00::1 fd00::1 fd00:ec2::254 fe80::1 febf::1 fe80::1%eth0 2606:4700::1%1 fec0::1 feff::1 ff02::1
ff0e::1
127.1 2130706433 0x7f000001 0177.0.0.1 localhost 8.8.8.8:443 [::1] 8.8.8.8/32
""".split()


@pytest.mark.parametrize("address", ALLOWED)
def test_public_addresses(address: str) -> None:
    assert address_allowed(address)
    assert address_allowed(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", [*REFUSED, "", " 8.8.8.8"])
def test_refused_addresses(address: str) -> None:
    assert not address_allowed(address)
    assert refusal(address)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1", "loopback"),
        ("169.254.169.254", "link-local"),
        ("64:ff9b::169.254.169.254", "link-local"),
        ("::ffff:10.0.0.1", "an IPv4 address in IPv6"),
        ("2002:7f00:1::1", "6to4"),
        ("2001::1", "Teredo"),
        ("fec0::1", "site-local"),
        ("fd00::1", "private"),
        ("168.63.129.16", "a cloud's metadata service"),
        ("localhost", "not an address"),
    ],
)
def test_reasons(address: str, reason: str) -> None:
    assert refusal(address) == reason


def test_nothing_that_python_calls_private_is_allowed() -> None:
    """Python's own table is older or newer than ours, but never stricter."""
    for address in ALLOWED:
        ip = ipaddress.ip_address(address)
        assert ip.is_global or ip in ipaddress.ip_network("64:ff9b::/96"), address
