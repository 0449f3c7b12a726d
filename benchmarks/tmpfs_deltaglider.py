"""`dg-cache deltaglider` with the best cache there could be: the reference is a file on tmpfs.

`python -m benchmarks.tmpfs_deltaglider REFERENCE [ARGUMENT ...]`, in DeltaGlider's environment, is
DeltaGlider's command line with a cache that always has REFERENCE and checks nothing; it begins and
ends as `dg-cache` does. What `dg-cache deltaglider` takes more than this is what dg-cached costs.
"""

import sys
from pathlib import Path
from typing import Any

from dgcache_cli.scripts import run_as_script


class TmpfsCache:
    """DeltaGlider's `CachePort` over one file that is there."""

    def __init__(self, reference: Path) -> None:
        """Use a file."""
        self._reference = reference

    def ref_path(self, bucket: str, prefix: str) -> Path:  # noqa: ARG002 - DeltaGlider's
        """Return it."""
        return self._reference

    def has_ref(self, bucket: str, prefix: str, sha: str) -> bool:  # noqa: ARG002 - DeltaGlider's
        """Say yes."""
        return True

    def get_validated_ref(self, bucket: str, prefix: str, expected_sha: str) -> Path:  # noqa: ARG002
        """Return it, unchecked."""
        return self._reference

    def write_ref(self, bucket: str, prefix: str, src: Path) -> Path:  # noqa: ARG002
        """Keep nothing."""
        return self._reference

    def evict(self, bucket: str, prefix: str) -> None:
        """Forget nothing."""

    def clear(self) -> None:
        """Forget nothing."""


def main() -> int:
    """Put the cache in place and run DeltaGlider."""
    from deltaglider.adapters import EncryptedCache
    from deltaglider.app.cli.main import cli

    reference, *arguments = sys.argv[1:]
    cache = TmpfsCache(Path(reference))

    def from_env(cls: type, backend: Any) -> Any:  # noqa: ARG001 - DeltaGlider's signature
        return cache

    stock: Any = EncryptedCache
    stock.from_env = classmethod(from_env)
    sys.argv = ["deltaglider", *arguments]
    result = cli.main(args=arguments, prog_name="deltaglider", standalone_mode=True)
    return int(result or 0)


if __name__ == "__main__":
    run_as_script(main)
