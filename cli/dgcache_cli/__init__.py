"""The `dg-cache` command."""
