"""Writes an object of the S3 server to standard output: `python -m benchmarks.fetch URL`.

It is what `dg-cache get --fetch` runs in the measurement of cold processes; the server counts it.
"""

import http.client
import shutil
import sys
from urllib.parse import urlsplit

from benchmarks.testbed import REQUEST_SECONDS, SIGNED

_PIECE_BYTES = 1 << 20


def main() -> int:
    """Fetch it."""
    url = urlsplit(sys.argv[1])
    connection = http.client.HTTPConnection(url.netloc, timeout=REQUEST_SECONDS)
    connection.request("GET", url.path, headers=SIGNED)
    answer = connection.getresponse()
    if answer.status != http.HTTPStatus.OK:
        sys.exit(f"{url.path}: {answer.status}")
    shutil.copyfileobj(answer, sys.stdout.buffer, _PIECE_BYTES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
