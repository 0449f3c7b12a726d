"""`python -m dgcache_cli` is `dg-cache`."""

from dgcache_cli.main import script

script()
