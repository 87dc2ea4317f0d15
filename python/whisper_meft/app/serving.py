"""Serving the page: to whom, what may be sent, and that no other machine is asked for anything."""

import ipaddress
import logging
import os
import re
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import UserError
from .page import CSS, theme

logger = logging.getLogger(__name__)

# The browser itself then loads and sends nothing elsewhere, whatever gradio or a model's card holds. gradio
# makes functions of its templates and styles of its own.
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' blob: 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'self'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
_LOCAL = ("127.0.0.1", "localhost", "[::1]")


class Guard:
    """An ASGI application before another: tells browsers to ask nobody else, and, where the page is for this
    machine alone, refuses requests that were made for another address or by another site's page.

    Args:
        app: the application behind it. local: whether the page is for this machine alone. own: the address
            that it is served at.
    """

    def __init__(self, app: Callable, local: bool, own: str = "127.0.0.1"):
        self.app, self.local = app, local
        self.names = {*_LOCAL, f"[{own}]" if ":" in own else own}

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if self.local and not _is_own(dict(scope["headers"]), self.names):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            return await send({"type": "http.response.body", "body": b"This page is for its own machine.\n"})

        async def sent(message: dict) -> None:
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        return await self.app(scope, receive, sent)


def _is_own(headers: dict[bytes, bytes], names: Collection[str]) -> bool:
    """Whether a request is for this machine by one of its names, and no other site's page made it."""
    host = headers.get(b"host", b"").decode("latin-1")
    origin = headers.get(b"origin")
    return re.sub(r":\d+$", "", host) in names and origin in (None, f"http://{host}".encode("latin-1"))


def free_address(host: str, port: int) -> tuple[str, int]:
    """The numeric address of a host, and a port that can be listened on there: the given one, or where that
    is 0 any that is free.

    Raises:
        UserError: there is no such address, or the port is taken or not ours to take.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host: there is no address {host!r}: {error}") from error
    with socket.socket(family, kind, protocol) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(address)
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"--host {host} --port {port} cannot be listened on: {why}") from error
        return tried.getsockname()[:2]


def shown(address: str, port: int) -> str:
    """Where a browser on this machine finds what listens on a numeric address and a port."""
    unspecified = {"0.0.0.0": "127.0.0.1", "::": "::1"}
    address = unspecified.get(address, address)
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


@contextmanager
def own_surroundings(address: str) -> Iterator[str]:
    """A folder for what is sent, told to gradio and gone afterwards. Its questions to its makers, who uses it
    and whether there is a newer version, are switched off, and no proxy stands before our own address."""
    direct = [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "localhost", "127.0.0.1", address]
    with tempfile.TemporaryDirectory(prefix="whisper_meft_app_") as folder:
        settings = {
            "GRADIO_TEMP_DIR": folder,
            "GRADIO_ANALYTICS_ENABLED": "False",
            "no_proxy": ",".join(filter(None, direct)),
        }
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            yield folder
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


@contextmanager
def served(build: Callable[[], Any], host: str, port: int, max_bytes: int) -> Iterator[str]:
    """Serves a page as long as it is entered; yields its address.

    Args: as :func:`serve`.
    """
    address, port = free_address(host, port)
    local = ipaddress.ip_address(address.partition("%")[0]).is_loopback
    if not local:
        logger.warning("everybody who reaches %s can use the page: there is no password", host)
    with own_surroundings(address):
        import gradio
        from starlette.middleware import Middleware

        page = build()
        # gradio itself holds what is asked for to what was sent, but only of a page that it launched.
        page.launch(
            server_name=f"[{address}]" if ":" in address else address,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            inline=False,
            share=False,
            show_error=False,
            footer_links=[],
            run_history=False,
            max_file_size=max_bytes,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            # What a screen reader is told, which gradio has no words for.
            i18n=gradio.I18n(en={"common.complete": "The answer is there."}),
            theme=theme(),
            css=CSS,
            # The pages on which an application describes itself load scripts from elsewhere.
            app_kwargs={
                "docs_url": None,
                "redoc_url": None,
                "openapi_url": None,
                "middleware": [Middleware(Guard, local=local, own=address)],
            },
        )
        try:
            yield shown(address, port)
        finally:
            page.close(verbose=False)


def serve(
    build: Callable[[], Any], host: str, port: int, max_bytes: int, ready: Callable[[str], None]
) -> None:
    """Serves a page until Ctrl-C or SIGTERM.

    Args:
        build: makes the page, a ``gradio.Blocks``. host: address that is listened on; one that is not this
            machine's own lets everybody in who reaches it. port: 0 is any that is free.
        max_bytes: of a file that is sent. ready: called with the page's address once it can be asked for.

    Raises:
        UserError: the address cannot be listened on.
    """
    with _ended_by_signals(), served(build, host, port, max_bytes) as address:
        ready(address)
        threading.Event().wait()


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM end what is in it, and what follows is done."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
