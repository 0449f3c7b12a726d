"""A real S3 server in a process of its own: moto's application over HTTP on loopback.

`python -m benchmarks.s3_server` prints one line, its URL, once it listens, and serves until
SIGTERM, SIGINT, or until its standard input closes, so that it cannot outlive the program that
started it.

`GET /__counts__` answers how often each (method, path) was asked for, as a JSON list of
`[method, path, count]`; `DELETE /__counts__` forgets them. These two are not counted.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

COUNTS_PATH = "/__counts__"
_PIECE_BYTES = 64 << 10


class RequestCounter:
    """WSGI middleware that counts requests by method and path."""

    def __init__(self, application: "WSGIApplication") -> None:
        self._application = application
        self._counts: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def __call__(
        self, environ: "WSGIEnvironment", start_response: "StartResponse"
    ) -> Iterable[bytes]:
        """Count the request and pass it on, or answer it where it is about the counts."""
        method = environ["REQUEST_METHOD"]
        path = environ["PATH_INFO"].encode("latin-1").decode("utf-8", "replace")  # PEP 3333
        if path == COUNTS_PATH:
            return self._answer(method, start_response)
        with self._lock:
            self._counts[method, path] += 1
        return self._application(environ, start_response)

    def _answer(self, method: str, start_response: "StartResponse") -> Iterable[bytes]:
        with self._lock:
            if method == "DELETE":
                self._counts.clear()
            rows = [[*key, count] for key, count in sorted(self._counts.items())]
        body = json.dumps(rows).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        start_response("200 OK", headers)
        return [body]


class SlowLink:
    """WSGI middleware that sends the bodies of GETs, all together, at a given rate."""

    def __init__(self, application: "WSGIApplication", bytes_per_second: float) -> None:
        self._application = application
        self._bytes_per_second = bytes_per_second
        self._free_at = 0.0
        self._lock = threading.Lock()

    def __call__(
        self, environ: "WSGIEnvironment", start_response: "StartResponse"
    ) -> Iterable[bytes]:
        """Pass the request on and pace what comes back."""
        body = self._application(environ, start_response)
        return self._paced(body) if environ["REQUEST_METHOD"] == "GET" else body

    def _paced(self, body: Iterable[bytes]) -> Iterator[bytes]:
        try:
            for block in body:
                for start in range(0, len(block), _PIECE_BYTES):
                    piece = block[start : start + _PIECE_BYTES]
                    self._occupy(len(piece))
                    yield piece
        finally:
            getattr(body, "close", lambda: None)()

    def _occupy(self, size: int) -> None:
        with self._lock:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + size / self._bytes_per_second
            wait = self._free_at - now
        time.sleep(wait)  # this is the link's speed, not a wait for something to happen


class _Handler(MotoRequestHandler):
    disable_nagle_algorithm = True  # or a delayed acknowledgement adds 40 ms to small answers

    def log(self, type: str, message: str, *args: Any) -> None:  # noqa: A002 - werkzeug's name
        """Log errors only: standard output belongs to the URL."""
        if type == "error":
            print(message % args, file=sys.stderr, flush=True)


class _Stopped(Exception):  # noqa: N818 - an answer, not an error
    """A signal asked the server to end."""


def _stop(_signum: int, _frame: FrameType | None) -> None:
    raise _Stopped


def main(argv: list[str] | None = None) -> int:
    """Serve until a signal comes or standard input closes."""
    arguments = _parse(argv)
    application: WSGIApplication = DomainDispatcherApplication(create_backend_app)
    if arguments.bytes_per_second:
        application = SlowLink(application, arguments.bytes_per_second)
    server = make_server(
        "127.0.0.1", 0, RequestCounter(application), threaded=True, request_handler=_Handler
    )
    with contextlib.suppress(_Stopped), server.socket:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _stop)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        while os.read(sys.stdin.fileno(), 4096):
            pass
    sys.stderr.flush()
    os._exit(0)  # threads in the middle of an answer have nobody to answer to


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.s3_server",
        description="Serve S3 on loopback until SIGTERM, SIGINT, or the end of standard input.",
    )
    parser.add_argument(
        "--bytes-per-second",
        type=float,
        default=0,
        metavar="RATE",
        help="send the bodies of GETs at this rate, all connections together (default: no limit)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
