"""`python -m dgcached` is `dg-cached`."""

import sys

from dgcached.main import main

sys.exit(main())
