"""The daemon: keeps a store resident and serves it to the processes of one user."""

from importlib.metadata import PackageNotFoundError, version

try:
    BUILD = version("dg-cached")
except PackageNotFoundError:  # run from a tree that was never installed
    BUILD = "0+unknown"
