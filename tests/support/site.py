"""A real HTTP server that plays a host of the public internet."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BODY = b"\x89PNG of sorts"
PUBLIC = "93.184.216.34"


class Site:
    """A real HTTP server that stands for the public internet; names and addresses are made up."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.connected: list[str] = []
        self.answers: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked.append((self.headers["Host"], self.path))
                answer = site.answers.get(self.path)
                if answer is None:
                    send_body(self, BODY)
                else:
                    answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def connect(self, address: str, port: int, seconds: float) -> socket.socket:
        self.connected.append(address)
        assert port == 80
        return socket.create_connection(("127.0.0.1", self.server.server_address[1]), timeout=seconds)


def send_body(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def redirect(to: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", to)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def names(table: dict[str, Sequence[str]]) -> Callable[[str, int], Sequence[str]]:
    def resolver(host: str, port: int) -> Sequence[str]:
        if host not in table:
            raise socket.gaierror(-2, "Name or service not known")
        return table[host]

    return resolver


HOSTS: dict[str, Sequence[str]] = {"img.example.com": [PUBLIC], "cdn.example.com": ["1.1.1.1"]}
