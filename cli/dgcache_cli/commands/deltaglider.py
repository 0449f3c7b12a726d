"""deltaglider and shim: DeltaGlider's own command line, unchanged, on the cache."""

import argparse
import logging
import os
import sys
from pathlib import Path

from dgcache_cli import exits
from dgcache_core.errors import CacheUnavailableError, InvalidReferenceError

_INSTALL_HINT = "DeltaGlider is not installed here: run pip install 'dg-cached[deltaglider]'"

_USAGE = """\
usage: dg-cache deltaglider [-v] COMMAND ...

Run DeltaGlider with its references from dg-cached. Every command and option of
`deltaglider` works as it does there, with the same exit status.

  -v    one line per reference: where it came from, how long it took, what it saved
        (also with DG_CACHE_REPORT=1)

examples:
  dg-cache deltaglider cp s3://releases/app/app-1.2.zip .
  dg-cache deltaglider -v cp app-1.3.zip s3://releases/app/app-1.3.zip
  dg-cache deltaglider --help    DeltaGlider's own help follows
"""

_SHIM = """\
#!{python}
# Made by `dg-cache shim`: DeltaGlider with its references from dg-cached.
import sys

from dgcache_cli.commands.deltaglider import run_deltaglider
from dgcache_cli.scripts import run_as_script

run_as_script(lambda: run_deltaglider(sys.argv[1:]))
"""


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add this group's commands."""
    deltaglider = commands.add_parser(
        "deltaglider", help="run DeltaGlider on the cache", add_help=False
    )
    deltaglider.add_argument("arguments", nargs=argparse.REMAINDER)
    deltaglider.set_defaults(run=lambda arguments: run_deltaglider(arguments.arguments))

    shim = commands.add_parser(
        "shim", help="write a `deltaglider` to DIR that runs on the cache; put DIR first in PATH"
    )
    shim.add_argument("directory", type=Path, metavar="DIR")
    shim.set_defaults(run=_shim)


def run_deltaglider(arguments: list[str]) -> int:
    """Run DeltaGlider's command line with these arguments and return its exit status."""
    while arguments[:1] == ["-v"]:
        os.environ["DG_CACHE_REPORT"] = "1"
        arguments = arguments[1:]
    wants_help = arguments[:1] in (["--help"], ["-h"])
    if wants_help:
        print(_USAGE, flush=True)
        arguments = ["--help"]
    try:
        from dgcache.deltaglider import install
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "deltaglider":
            raise
        print(f"dg-cache: {_INSTALL_HINT}", file=sys.stderr)
        return exits.OK if wants_help else exits.UNAVAILABLE
    from deltaglider.app.cli.main import cli

    _print_reports()
    install()
    sys.argv = ["deltaglider", *arguments]
    result = cli.main(args=arguments, prog_name="deltaglider", standalone_mode=True)
    return int(result or exits.OK)


def _print_reports() -> None:
    """Show what the SDK says: it never prints by itself."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("dg-cache: %(message)s"))
    logger = logging.getLogger("dgcache")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _shim(arguments: argparse.Namespace) -> int:
    directory: Path = arguments.directory
    path = directory / "deltaglider"
    if " " in sys.executable or len(sys.executable) > 120:
        raise InvalidReferenceError(
            f"{sys.executable} cannot stand behind #!: it is too long or has a space"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if path.exists() and "dg-cache shim" not in path.read_text(errors="replace"):
            raise InvalidReferenceError(
                f"{path} exists and is not a shim: choose another directory"
            )
        path.write_text(_SHIM.format(python=sys.executable))
        path.chmod(0o755)
    except OSError as error:
        raise CacheUnavailableError(f"cannot write {path}: {error.strerror}") from error
    print(f"wrote {path}")
    print(f'next: export PATH="{directory.absolute()}:$PATH"')
    return exits.OK
