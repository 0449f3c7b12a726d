"""What a command that changes an account did: a line a step as it does it, or JSON at the end.

A dry run goes the same way and changes nothing.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Self

from dgcache_cli.output import print_json

_PAST = {
    "disable": "disabled",
    "enable": "enabled",
    "end": "ended",
    "reload": "reloaded",
    "remove": "removed",
    "replace": "replaced",
    "restart": "restarted",
    "start": "started",
    "stop": "stopped",
    "write": "wrote",
}


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that was done, or found to be so."""

    action: str
    what: str
    detail: str


class Steps:
    """A context manager: JSON is printed when it is left, also by an error."""

    def __init__(self, *, as_json: bool, dry_run: bool) -> None:
        """Begin with nothing done."""
        self.dry_run = dry_run
        self._as_json = as_json
        self._steps: list[Step] = []
        self._warnings: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._as_json:
            print_json(
                {
                    "dry_run": self.dry_run,
                    "steps": [asdict(step) for step in self._steps],
                    "warnings": self._warnings,
                    "problem": None if error is None else str(error),
                }
            )

    def do(self, action: str, what: object, work: Callable[[], object], detail: str = "") -> None:
        """Do something, unless this is a dry run, and say it.

        Args:
            action: a verb of `_PAST`.
            what: a path or a unit.
            work: what does it.
            detail: what else there is to say.
        """
        if not self.dry_run:
            work()
        verb = f"would {action}" if self.dry_run else _PAST[action]
        self._note(Step(action, str(what), detail), verb)

    def find(self, state: str, what: object, detail: str = "") -> None:
        """Say how something is that was left as it is."""
        self._note(Step(state, str(what), detail), state)

    def warn(self, text: str) -> None:
        """Say what the user should know or mend."""
        self._warnings.append(text)
        if not self._as_json:
            sys.stdout.flush()
            print(f"dg-cache: warning: {text}", file=sys.stderr)

    def _note(self, step: Step, verb: str) -> None:
        self._steps.append(step)
        if not self._as_json:
            print(f"{verb} {step.what}{': ' if step.detail else ''}{step.detail}")
