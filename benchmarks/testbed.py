"""What a test, a benchmark or the demo needs around it: the S3 server as a child process.

`S3Server` is a context manager. Leaving it ends the process for certain; should this process be
killed instead, the server sees its standard input close and ends by itself.
"""

import http.client
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from urllib.parse import quote, urlsplit

from benchmarks.s3_server import COUNTS_PATH

ROOT = Path(__file__).resolve().parent.parent
"""The clone."""

START_SECONDS = 60.0
STOP_SECONDS = 5.0
REQUEST_SECONDS = 60.0
REFERENCE_SUFFIX = "/reference.bin"
"""How the key of every reference ends in DeltaGlider's layout."""

_BLOCK_BYTES = 1 << 20
_FOREIGN_PREFIXES = ("AWS_", "DG_", "BOTO_")
_FOREIGN_SUFFIXES = ("_PROXY",)
# moto looks at the form of a signature and at nothing else
SIGNED = {
    "Authorization": "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, "
    "SignedHeaders=host, Signature=0"
}


class TestbedError(Exception):
    """A part of the testbed did not do what it is there for; the message says which."""


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return our environment without what would lead DeltaGlider or dg-cached elsewhere.

    Settings of AWS, DeltaGlider and dg-cached, and proxies, are left out; `extra` is added.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_FOREIGN_PREFIXES) and not name.upper().endswith(_FOREIGN_SUFFIXES)
    }
    return {**kept, **(extra or {})}


class S3Server:
    """An S3 server in a process of its own, alive inside the `with` block."""

    def __init__(self, *, bytes_per_second: float = 0, spool_directory: Path | None = None) -> None:
        """Prepare the server.

        Args:
            bytes_per_second: rate of all bodies of GETs together; 0 is no limit.
            spool_directory: where the server keeps large objects (nameless files; default TMPDIR).
        """
        self._bytes_per_second = bytes_per_second
        self._spool_directory = spool_directory
        self._stack = ExitStack()
        self.url = ""
        self.pid = 0

    def __enter__(self) -> Self:
        """Start the server; return when it listens.

        Raises:
            TestbedError: it does not listen in time; what it wrote is in the message.
        """
        environment = clean_environment()
        if self._spool_directory is not None:
            environment["TMPDIR"] = str(self._spool_directory)
        with ExitStack() as stack:
            errors = stack.enter_context(tempfile.TemporaryFile())
            lifeline, _ = _pipe(stack)
            output, output_end = _pipe(stack)
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "benchmarks.s3_server"),
                    *("--bytes-per-second", str(self._bytes_per_second)),
                ],
                cwd=ROOT,
                env=environment,
                stdin=lifeline,
                stdout=output_end,
                stderr=errors,
                process_group=0,  # Ctrl-C in a terminal is for the program that started it
            )
            stack.callback(end_process, process, STOP_SECONDS)
            output_end.close()  # so that its end is seen when the server ends
            self.url, self.pid = _read_url(output, errors), process.pid
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the server."""
        self._stack.close()

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the whole environment of a process that shall use this server, `extra` added."""
        return clean_environment(
            {
                "AWS_ENDPOINT_URL": self.url,
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
                "AWS_CONFIG_FILE": os.devnull,
                "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
                "DG_DISABLE_EC2_DETECTION": "true",
                "DG_SUPPRESS_DEPRECATION": "1",
                **(extra or {}),
            }
        )

    def count(self, method: str, key_suffix: str = "") -> int:
        """Return how many requests of `method` were for a path that ends in `key_suffix`."""
        rows = json.loads(b"".join(self.request("GET", COUNTS_PATH)))
        return sum(
            count for name, path, count in rows if name == method and path.endswith(key_suffix)
        )

    def reset_counts(self) -> None:
        """Forget what was counted."""
        for _ in self.request("DELETE", COUNTS_PATH):
            pass

    def create_bucket(self, bucket: str) -> None:
        """Make an empty bucket."""
        for _ in self.request("PUT", f"/{bucket}"):
            pass

    def save(self, bucket: str, key: str, destination: Path) -> None:
        """Write an object to a file as it is stored, block by block."""
        with destination.open("wb") as file:
            for block in self.request("GET", f"/{bucket}/{quote(key)}"):
                file.write(block)

    def put(self, bucket: str, key: str, body: bytes) -> None:
        """Store an object as any program may, without DeltaGlider and its metadata."""
        for _ in self.request("PUT", f"/{bucket}/{quote(key)}", body):
            pass

    def request(self, method: str, path: str, body: bytes | None = None) -> Iterator[bytes]:
        """Yield the body of the answer to one request, block by block.

        Raises:
            TestbedError: the server's answer is not a success.
        """
        where = urlsplit(self.url)
        connection = http.client.HTTPConnection(where.netloc, timeout=REQUEST_SECONDS)
        try:
            connection.request(method, path, body, headers=SIGNED)
            answer = connection.getresponse()
            if answer.status >= http.HTTPStatus.BAD_REQUEST:
                raise TestbedError(f"{method} {path}: {answer.status} {answer.read(2000)!r}")
            while block := answer.read(_BLOCK_BYTES):
                yield block
        finally:
            connection.close()


def _pipe(stack: ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    reader, writer = os.pipe()
    return (
        stack.enter_context(os.fdopen(reader, "rb", 0)),
        stack.enter_context(os.fdopen(writer, "wb", 0)),
    )


def _read_url(output: IO[bytes], errors: IO[bytes]) -> str:
    deadline = time.monotonic() + START_SECONDS
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([output], [], [], max(0, deadline - time.monotonic()))
        block = os.read(output.fileno(), 1024) if ready else b""
        if not block:
            errors.seek(0)
            words = errors.read()[-2000:].decode(errors="replace").strip()
            what = "ended" if ready else f"did not listen within {START_SECONDS:.0f} s"
            raise TestbedError(f"the S3 server {what}: {words}")
        line += block
    return line.decode().strip()


def end_process(process: "subprocess.Popen[bytes]", seconds: float) -> int:
    """End a child: SIGTERM, and SIGKILL where it is still there after `seconds`."""
    process.terminate()
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
