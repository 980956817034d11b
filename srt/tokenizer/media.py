"""Where images come from: data URIs and base64 in the request, or hosts that the operator has listed.

A remote host is spoken to only if `--allowed-media-domains` names it, and then only at a public address: its name is
resolved once, every address is checked, and the connection goes to the address that was checked, so that a name
which resolves differently the second time gains nothing. Redirects are new URLs and are checked like the first.
Local paths and `file:` URLs are never read.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, urljoin, urlsplit

from srt.errors import ErrorCode, ServingError
from srt.tokenizer.image_jobs import refuse

REDIRECTS_MAX: Final = 3
READ_BYTES: Final = 1 << 16
PORTS: Final = {"http": 80, "https": 443}
REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
PATH_CHARACTERS: Final = "!$%&'()*+,/:;=?@[]~"
"""What goes over the wire as it is; other characters of a path are percent-encoded."""
SHOWN: Final = 100
"""Characters of a URL that an error repeats."""

Resolver = Callable[[str, int], Sequence[str]]
"""(host, port) -> numeric addresses. Raises: OSError."""
Connector = Callable[[str, int, float], socket.socket]
"""(numeric address, port, seconds) -> a connected socket. Raises: OSError."""


@dataclass(frozen=True)
class Inline:
    """An image in the request itself, as base64 text."""

    base64: str


@dataclass(frozen=True)
class Remote:
    """An image that must be fetched."""

    url: str


def parse_source(text: str) -> Inline | Remote:
    """What an image reference of a request means.

    Raises: ServingError if it is nothing that is served; base64 is checked later, when it is decoded.
    """
    head = text[:SHOWN].lstrip()
    scheme = head.partition(":")[0].lower()
    if scheme == "data" and ":" in head:
        return Inline(_data_of(text))
    if scheme in PORTS and "://" in head:
        return Remote(text.strip())
    # "/9j/" begins the base64 of a JPEG file.
    if ":" in head or (head.startswith(("/", "~", ".")) and not head.startswith("/9j/")):
        raise refuse(
            f"an image is given as a data URI, a URL or base64, not as {head[:40]!r}; local files are never read"
        )
    if not head:
        raise refuse("an image reference is empty")
    return Inline(text)


def _data_of(uri: str) -> str:
    """The base64 part of a data URI."""
    head, comma, data = uri.partition(",")
    kind, *parameters = head.strip()[len("data:") :].split(";")
    if not comma:
        raise refuse("the data URI has no comma; its form is data:image/png;base64,...")
    if kind and not kind.lower().startswith("image/") and kind.lower() != "application/octet-stream":
        raise refuse(f"the data URI holds {kind[:40]!r}, it must hold an image")
    if "base64" not in [parameter.strip().lower() for parameter in parameters]:
        raise refuse("the data URI is not marked as base64; its form is data:image/png;base64,...")
    return data


def is_public(address: str) -> bool:
    """Whether an address is reachable for everybody: not loopback, private, link-local, reserved, nor one of these
    inside an IPv6 address."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    # Of IPv6 addresses that carry an IPv4 one none is needed.
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _CARRIERS)


_CARRIERS: Final = tuple(
    ipaddress.ip_network(network)
    for network in (
        "::/96",  # compatible
        "::ffff:0:0/96",  # mapped
        "::ffff:0:0:0/96",  # translated
        "64:ff9b::/96",  # NAT64
        "64:ff9b:1::/48",
        "2002::/16",  # 6to4
        "2001::/32",  # Teredo
    )
)


def resolve(host: str, port: int) -> list[str]:
    """Numeric addresses of a host, by the system's resolver."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def connect(address: str, port: int, seconds: float) -> socket.socket:
    """A TCP connection."""
    return socket.create_connection((address, port), timeout=seconds)


@dataclass(frozen=True)
class _Target:
    """A URL that passed all checks, and the address to ask."""

    scheme: str
    host: str
    port: int
    path: str
    address: str


class Fetcher:
    """Fetches images from the listed hosts. Limits are those of one image: bytes, and seconds over all redirects."""

    def __init__(
        self,
        domains: Sequence[str],
        bytes_max: int,
        seconds: float,
        resolver: Resolver = resolve,
        connector: Connector = connect,
    ) -> None:
        self.domains = frozenset(domain.lower().rstrip(".") for domain in domains)
        self._bytes_max, self._seconds = bytes_max, seconds
        self._resolver, self._connector = resolver, connector
        self._tls = ssl.create_default_context()

    def allow(self, url: str) -> None:
        """Check a URL as far as its text goes. Raises: ServingError if its host is not listed, or it is malformed."""
        self._parse(url)

    def fetch(self, url: str) -> bytes:
        """The body behind a URL.

        Raises: ServingError that says which rule the URL, a redirect or the answer breaks.
        """
        deadline = time.monotonic() + self._seconds
        for _ in range(REDIRECTS_MAX + 1):
            target = self._check(url)
            try:
                answer = self._get(target, deadline)
            except TimeoutError as error:
                raise self._late() from error
            except (OSError, http.client.HTTPException) as error:
                self._left(deadline)
                reason = str(error) or type(error).__name__
                raise refuse(f"the image at {url[:SHOWN]} could not be fetched: {reason}") from error
            if not isinstance(answer, str):
                return answer
            url = urljoin(url, answer)
        raise refuse(f"the image's URL redirects more than {REDIRECTS_MAX} times")

    def _parse(self, url: str) -> tuple[str, str, int, str]:
        """(scheme, host, port, path) of a URL whose host is listed."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise refuse(f"the image URL {url[:SHOWN]!r} is malformed: {error}") from error
        host = (parts.hostname or "").rstrip(".")
        if parts.scheme not in PORTS or not host:
            raise refuse(f"the image URL {url[:SHOWN]!r} is neither http nor https")
        if any(ord(character) <= 32 or ord(character) == 127 for character in url):
            raise refuse(f"the image URL {url[:SHOWN]!r} holds a space or a control character")
        if "@" in parts.netloc:
            raise refuse("the image URL holds a user name; only plain URLs are fetched")
        if host not in self.domains:
            listed = "lists no host" if not self.domains else "does not list it"
            raise ServingError(
                ErrorCode.INVALID_REQUEST,
                f"images from {host[:SHOWN]!r} are not fetched: --allowed-media-domains {listed}; "
                "send the image as a data URI",
                "image_url",
            )
        if port is not None and port != PORTS[parts.scheme]:
            raise refuse(f"the image URL names port {port}; only {PORTS[parts.scheme]} is used for {parts.scheme}")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return parts.scheme, host, PORTS[parts.scheme], quote(path, safe=PATH_CHARACTERS)

    def _check(self, url: str) -> _Target:
        scheme, host, port, path = self._parse(url)
        try:
            addresses = list(self._resolver(host, port))
        except (OSError, UnicodeError) as error:
            raise refuse(f"the image's host {host!r} cannot be resolved: {error}") from error
        if not addresses:
            raise refuse(f"the image's host {host!r} has no address")
        for address in addresses:
            if not is_public(address):
                raise refuse(f"the image's host {host!r} has the address {address}, which is not a public one")
        return _Target(scheme, host, port, path, addresses[0])

    def _get(self, target: _Target, deadline: float) -> bytes | str:
        """The body, or where a redirect leads."""
        sock = self._connector(target.address, target.port, self._left(deadline))
        if target.scheme == "https":
            sock = self._tls.wrap_socket(sock, server_hostname=target.host, do_handshake_on_connect=False)
        connection = http.client.HTTPConnection(target.host, target.port)
        connection.sock = sock
        # A peer that sends a byte now and then never runs into the socket's own timeout.
        timer = threading.Timer(self._left(deadline), _hang_up, [sock])
        timer.daemon = True
        timer.start()
        try:
            sock.settimeout(self._left(deadline))
            if target.scheme == "https":
                sock.do_handshake()  # type: ignore[attr-defined]
            headers = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "srt"}
            connection.request("GET", target.path, headers=headers)
            with connection.getresponse() as response:
                if response.status in REDIRECTS:
                    return response.getheader("Location") or ""
                if response.status != 200:
                    raise refuse(f"the image's host {target.host!r} answers with status {response.status}")
                return self._read(response, deadline)
        finally:
            timer.cancel()
            connection.close()
            sock.close()

    def _read(self, response: http.client.HTTPResponse, deadline: float) -> bytes:
        body = bytearray()
        while part := response.read1(READ_BYTES):
            body += part
            if len(body) > self._bytes_max:
                raise refuse(f"the image has more than {self._bytes_max} bytes, the limit (--max-image-bytes)")
        self._left(deadline)
        return bytes(body)

    def _left(self, deadline: float) -> float:
        """Seconds until the deadline. Raises: ServingError if it has passed."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise self._late()
        return left

    def _late(self) -> ServingError:
        return refuse(f"the image could not be fetched within {self._seconds:g} s (--max-image-seconds)")


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
