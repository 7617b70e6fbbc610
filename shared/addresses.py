"""Network addresses as configuration writes them."""

from __future__ import annotations


def host_and_port(text: str) -> tuple[str, int]:
    """Split ``host:port``; an IPv6 host stands in brackets. Raises ValueError."""
    host, separator, port = text.rpartition(":")
    if not separator or not port.isdecimal():
        raise ValueError(f"{text!r} is not host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)
