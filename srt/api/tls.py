"""The certificate of a server that speaks HTTPS."""

from __future__ import annotations

import ssl

from srt.configs.server import ServerConfig
from srt.errors import StartupError


def tls_context(server: ServerConfig) -> ssl.SSLContext | None:
    """What the listener speaks TLS with; None if it speaks plain HTTP.

    Raises: StartupError if the files cannot be read or do not belong together.
    """
    if server.ssl_certfile is None:
        if server.ssl_keyfile is not None:
            raise StartupError(f"--ssl-keyfile {server.ssl_keyfile} needs --ssl-certfile")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    key = server.ssl_keyfile or server.ssl_certfile
    try:
        # With a password at hand OpenSSL asks nobody at a terminal; an encrypted key is refused.
        context.load_cert_chain(server.ssl_certfile, server.ssl_keyfile, password=b"")
    except OSError as error:  # ssl.SSLError is one
        raise StartupError(f"no TLS with the certificate {server.ssl_certfile} and the key {key}: {error}") from error
    context.set_alpn_protocols(["http/1.1"])
    return context
