"""docs/attacks.md and the tests of this folder name each other."""

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "attacks.md"
CASES = {
    row[1].strip(): re.findall(r"`(test_[a-z0-9_]+)`", row[4])
    for row in (line.split("|") for line in DOCUMENT.read_text().splitlines())
    if len(row) == 6 and re.fullmatch(r" \d+[ab]? ", row[1])
}
TESTS = {
    node.name
    for path in HERE.glob("test_*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
}


def number(case: str) -> str:
    """Return a case as a test's name has it: `5a` is `05a`."""
    return case.rjust(2 + (not case.isdigit()), "0")


def test_every_case_is_there() -> None:
    """Seventy-four, from 1 to 69, with 5a, 15a, 37a, 37b and 59a."""
    whole = {str(case) for case in range(1, 70)} | {"5a", "15a", "37a", "37b", "59a"}
    assert set(CASES) == whole


@pytest.mark.parametrize("case", CASES)
def test_a_case_names_the_tests_that_have_its_number(case: str) -> None:
    """All of them, and at least one."""
    named = set(CASES[case])
    numbered = {name for name in TESTS if name.startswith(f"test_{number(case)}_")}
    assert named == numbered != set()
