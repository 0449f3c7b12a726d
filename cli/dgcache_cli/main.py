"""`dg-cache`: the entry point; finds the command and turns errors into exit statuses.

It is started for every file of a script, so that it imports what the command needs and no more.
"""

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn

from dgcache_cli import exits
from dgcache_cli.scripts import run_as_script
from dgcache_core.errors import CacheError

_EPILOG = f"""\
examples:
  dg-cache start                                   start the daemon
  dg-cache deltaglider cp s3://b/app/app.zip .     DeltaGlider with a warm cache
  dg-cache status                                  what it saved so far
  dg-cache put s3://b/app reference.bin            store a reference, print its digest
  dg-cache get s3://b/app SHA256 -o reference.bin  get it back
  eval "$(dg-cache completion bash)"               completions for this shell

{exits.EXPLAINED}
"""


def script() -> NoReturn:
    """Be the console script."""
    run_as_script(main)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["deltaglider"]:  # its options are DeltaGlider's, argparse must not read them
        from dgcache_cli.commands.deltaglider import run_deltaglider

        return _guarded(lambda: run_deltaglider(words[1:]))
    arguments = make_parser(words[0] if words else None).parse_args(words)
    return _guarded(lambda: int(arguments.run(arguments)))


def _guarded(command: Callable[[], int]) -> int:
    try:
        status = command()
        sys.stdout.flush()
    except CacheError as error:
        return exits.failed(error)
    except BrokenPipeError:  # the reader of a pipe went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except KeyboardInterrupt:
        return 128 + 2
    return status


_GROUPS = {
    "daemon": ("start", "stop", "restart", "status", "logs"),
    "doctor": ("doctor",),
    "events": ("events",),
    "references": ("get", "put", "has", "ls", "evict", "clear"),
    "setup": ("config", "completion"),
    "install": ("install",),
    "uninstall": ("uninstall",),
    "bench": ("bench",),
    "cleanup": ("cleanup",),
    "deltaglider": ("deltaglider", "shim"),
}
"""The modules of `commands`, in the order of the help, and what each adds."""


def make_parser(only: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the whole command line, or of the one command `only` where there is one.

    All modules together take ten times as long to import as the one that is needed.
    """
    groups = [name for name, commands in _GROUPS.items() if only in commands] or list(_GROUPS)
    parser = _Parser(
        prog="dg-cache",
        description="Use and look after dg-cached, the cache of delta references.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action=_PrintVersion, nargs=0, help="show the version and exit"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in groups:
        import_module(f"dgcache_cli.commands.{name}").add_commands(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    """Finds the width of the terminal as shutil does, without its archivers (10 ms)."""

    def _get_formatter(self) -> argparse.HelpFormatter:
        make: Any = self.formatter_class
        formatter: argparse.HelpFormatter = make(prog=self.prog, width=_columns() - 2)
        return formatter


def _columns() -> int:
    with suppress(ValueError):
        columns = int(os.environ.get("COLUMNS", ""))
        if columns > 0:
            return columns
    with suppress(AttributeError, ValueError, OSError):  # no, a closed, or no terminal's output
        return os.get_terminal_size(sys.__stdout__.fileno()).columns or 80  # type: ignore[union-attr]
    return 80


class _PrintVersion(argparse.Action):
    """Looks the version up when it is asked for: importlib.metadata costs 30 ms."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"dg-cache {version('dg-cached')}")
        except PackageNotFoundError:
            print("dg-cache 0+unknown")
        parser.exit()
