"""`python -m dgcache_cli` is `dg-cache`."""

import sys

from dgcache_cli.main import main

sys.exit(main())
