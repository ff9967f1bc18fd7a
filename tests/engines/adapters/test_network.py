"""Which addresses count as public, whichever way they are written."""

from __future__ import annotations

import ipaddress

import pytest

from loraplex.engines.adapters.sources.network import is_public, resolve
from loraplex.engines.errors import AdapterNotFound, AdapterSourceForbidden

PRIVATE = [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "192.0.2.1", "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1",
    "fc00::1", "fd12::1", "ff02::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2002:c0a8:101::1", "2001:0:7f00:1::",
]  # fmt: skip
PUBLIC = ["1.1.1.1", "8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]


@pytest.mark.parametrize("address", PRIVATE)
def test_is_public_private_address_is_not(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", PUBLIC)
def test_is_public_public_address_is(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("host", ["localhost", "127.1", "2130706433", "0x7f.1", "0", "::1", "::ffff:127.0.0.1"])
def test_resolve_loopback_in_disguise_is_forbidden(host: str) -> None:
    with pytest.raises(AdapterSourceForbidden, match="not a public address"):
        resolve(host, 443, allow_private=False)


@pytest.mark.parametrize("host", ["a" * 300, "a..b", "nowhere.invalid"])
def test_resolve_impossible_host_is_not_found(host: str) -> None:
    with pytest.raises(AdapterNotFound, match="there is no host"):
        resolve(host, 443, allow_private=True)
