"""Which internet addresses a server may be sent to by a stranger's URL: public ones."""

import ipaddress

_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""The last 32 bits are an IPv4 address (RFC 6052)."""


def is_public(address: str) -> bool:
    """Whether `address` is a public unicast address, and the IPv4 address that may hide in an IPv6 one as well."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # for example with a zone: fe80::1%eth0
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = _inner(ip)
        if inner is not None:
            return is_public(str(inner))
        if ip not in _GLOBAL_UNICAST:
            return False
    return ip.is_global and not ip.is_multicast


def _inner(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that packets to `ip` end up at."""
    if ip in _NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
