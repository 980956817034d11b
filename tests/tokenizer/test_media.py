"""Image references of requests: what is served, and every known way to make a server fetch what it should not."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler

import pytest

from srt.errors import ServingError
from srt.tokenizer.media import Fetcher, Inline, Remote, is_public, parse_source
from tests.support.site import BODY, HOSTS, PUBLIC, Site, names, redirect

# --- what a reference means ------------------------------------------------------------------------------


def test_a_data_uri_holds_base64() -> None:
    assert parse_source("data:image/png;base64,aGk=") == Inline("aGk=")
    assert parse_source("DATA:image/jpeg;charset=x;BASE64,aGk=") == Inline("aGk=")
    assert parse_source("data:;base64,aGk=") == Inline("aGk=")


def test_text_without_a_scheme_is_base64() -> None:
    assert parse_source("iVBORw0KGgo=") == Inline("iVBORw0KGgo=")
    assert parse_source("/9j/4AAQSkZJRg==") == Inline("/9j/4AAQSkZJRg==")


def test_urls_are_remote() -> None:
    assert parse_source(" https://example.com/a.png ") == Remote("https://example.com/a.png")
    assert parse_source("HTTP://example.com/a.png") == Remote("HTTP://example.com/a.png")


@pytest.mark.parametrize(
    "text",
    ["file:///etc/passwd", "FILE:/etc/passwd", "/etc/hosts.png", "~/a.png", "./a.png", "../a.png", "ftp://x/a.png",
     "gopher://127.0.0.1:6379/_x", "C:\\a.png", "dict://x", "s3://bucket/a", "jar:file:///a", "", "   "],
)  # fmt: skip
def test_paths_and_other_schemes_are_refused(text: str) -> None:
    with pytest.raises(ServingError) as caught:
        parse_source(text)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("uri", "problem"),
    [("data:image/png;base64", "no comma"), ("data:image/png,aGk=", "not marked as base64"),
     ("data:text/html;base64,aGk=", "it must hold an image")],
)  # fmt: skip
def test_malformed_data_uris_are_refused(uri: str, problem: str) -> None:
    with pytest.raises(ServingError, match=problem):
        parse_source(uri)


# --- addresses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.255.255.254", "0.0.0.0", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1",
     "169.254.169.254", "100.64.0.1", "192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1",
     "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0",
     "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254",
     "::ffff:93.184.216.34", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::",
     "2001:0:4136:e378:8000:63bf:3fff:fdd2", "localhost", ""],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", [PUBLIC, "1.1.1.1", "8.8.8.8", "2606:4700:4700::1111", "2a00:1450:4001::8a"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


# --- fetching --------------------------------------------------------------------------------------------


def fetcher(site: Site, table: dict[str, Sequence[str]] = HOSTS, *, seconds: float = 5.0) -> Fetcher:
    return Fetcher(["img.example.com", "CDN.example.com."], 1 << 20, seconds, names(table), site.connect)


def refusal(call: Fetcher, url: str) -> str:
    with pytest.raises(ServingError) as caught:
        call.fetch(url)
    assert caught.value.status == 400
    return caught.value.text


def test_a_listed_host_is_asked_at_the_address_that_was_checked(site: Site) -> None:
    assert fetcher(site).fetch("http://IMG.example.com/a/b.png?c=d e".replace(" ", "%20")) == BODY
    assert site.asked == [("img.example.com", "/a/b.png?c=d%20e")]
    assert site.connected == [PUBLIC]


def test_without_a_list_nothing_is_fetched(site: Site) -> None:
    none = Fetcher([], 1 << 20, 5.0, names(HOSTS), site.connect)
    assert "--allowed-media-domains lists no host" in refusal(none, "http://img.example.com/a.png")
    assert site.connected == []


@pytest.mark.parametrize(
    "url",
    ["http://evil.example.com/a.png", "http://img.example.com.evil.com/", "http://evilimg.example.com/",
     "http://sub.img.example.com/", "http://127.0.0.1/", "http://2130706433/", "http://0x7f.1/", "http://[::1]/",
     "http://[::ffff:169.254.169.254]/", "http://169.254.169.254/latest/meta-data", "http://localhost/",
     "http://img.example.com@evil.com/", "http://evil.com#@img.example.com/", "http://user:pw@img.example.com/",
     "http://img.example.com:8080/", "http://img.example.com:99999/", "https://img.example.com:80/", "http:///a",
     "http://img.example.com/a b", "http://img.example.com/a\r\nX: y", "http://evil.com\\@img.example.com/"],
)  # fmt: skip
def test_urls_that_try_to_get_around_the_list(site: Site, url: str) -> None:
    refusal(fetcher(site), url)
    assert site.connected == []


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "::ffff:10.0.0.1", "fd00::1"])
def test_a_listed_host_with_a_private_address_is_refused(site: Site, address: str) -> None:
    text = refusal(fetcher(site, {"img.example.com": [address]}), "http://img.example.com/a.png")
    assert text == f"the image's host 'img.example.com' has the address {address}, which is not a public one"
    assert site.connected == []


def test_one_private_address_among_public_ones_is_enough_to_refuse(site: Site) -> None:
    refusal(fetcher(site, {"img.example.com": [PUBLIC, "192.168.0.1"]}), "http://img.example.com/a.png")
    assert site.connected == []


def test_a_name_that_resolves_differently_the_second_time_gains_nothing(site: Site) -> None:
    lookups = iter([[PUBLIC], ["127.0.0.1"], ["127.0.0.1"]])
    rebinding = Fetcher(["img.example.com"], 1 << 20, 5.0, lambda host, port: next(lookups), site.connect)
    assert rebinding.fetch("http://img.example.com/a.png") == BODY
    assert site.connected == [PUBLIC]
    assert "not a public one" in refusal(rebinding, "http://img.example.com/a.png")


def test_redirects_between_listed_hosts_are_followed(site: Site) -> None:
    site.answers = {"/a": redirect("/b"), "/b": redirect("http://cdn.example.com/c")}
    assert fetcher(site).fetch("http://img.example.com/a") == BODY
    assert site.connected == [PUBLIC, PUBLIC, "1.1.1.1"]
    assert site.asked[-1] == ("cdn.example.com", "/c")


@pytest.mark.parametrize(
    "to",
    ["http://127.0.0.1/", "http://169.254.169.254/latest", "http://evil.com/", "file:///etc/passwd", "gopher://x/",
     "//evil.com/a", "http://img.example.com:22/", "http://[::1]:80/", "data:image/png;base64,aGk="],
)  # fmt: skip
def test_a_redirect_to_what_is_not_served_is_refused(site: Site, to: str) -> None:
    site.answers = {"/a": redirect(to)}
    refusal(fetcher(site), "http://img.example.com/a")
    assert site.connected == [PUBLIC]


def test_redirects_have_an_end(site: Site) -> None:
    site.answers = {"/a": redirect("/a")}
    assert "redirects more than 3 times" in refusal(fetcher(site), "http://img.example.com/a")
    assert len(site.connected) == 4


def test_a_body_beyond_the_limit_is_not_read_to_its_end(site: Site) -> None:
    sent = 0

    def endless(handler: BaseHTTPRequestHandler) -> None:
        nonlocal sent
        handler.send_response(200)
        handler.end_headers()
        try:
            while True:
                sent += handler.wfile.write(b"\0" * 65536)
        except OSError:
            pass

    site.answers = {"/a": endless}
    assert "more than 1048576 bytes" in refusal(fetcher(site), "http://img.example.com/a")
    time.sleep(0.1)
    assert sent < 64 << 20


def test_a_host_that_drips_bytes_is_given_up_in_time(site: Site) -> None:
    def drip(handler: BaseHTTPRequestHandler) -> None:
        try:
            for _ in range(100):
                handler.wfile.write(b"H")
                handler.wfile.flush()
                time.sleep(0.05)
        except OSError:
            pass

    site.answers = {"/a": drip}
    began = time.monotonic()
    text = refusal(fetcher(site, seconds=0.4), "http://img.example.com/a")
    assert text == "the image could not be fetched within 0.4 s (--max-image-seconds)"
    assert time.monotonic() - began < 2


def test_errors_of_a_host_are_told(site: Site) -> None:
    site.answers = {"/a": lambda handler: handler.send_error(404)}
    assert "'img.example.com' answers with status 404" in refusal(fetcher(site), "http://img.example.com/a")
    nowhere = fetcher(site, {})
    assert "cannot be resolved" in refusal(nowhere, "http://img.example.com/a")
    closed = Fetcher(["img.example.com"], 1 << 20, 1.0, names(HOSTS), refuse_connections)
    assert "could not be fetched" in refusal(closed, "http://img.example.com/a")


def refuse_connections(address: str, port: int, seconds: float) -> socket.socket:
    raise ConnectionRefusedError(111, "Connection refused")
