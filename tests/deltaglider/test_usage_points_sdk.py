"""Every method of DeltaGlider's SDK that needs a reference takes it from the cache."""

import ast
from collections.abc import Iterator
from pathlib import Path

from benchmarks.testbed import S3Server

from dgcache import Settings
from tests.deltaglider.conftest import ENVIRONMENT, run_suite
from tests.deltaglider.usage import both

USAGE_POINTS = {
    ("create_service", "from_env"): "test_cp_encodes_and_decodes_with_the_cached_reference",
    ("create_client", "from_env"): "test_clear_cache_forgets_in_this_client_alone",
    ("get", "has_ref"): "test_put_object_and_get_object",
    ("get", "_cache_reference"): "test_clear_cache_forgets_in_this_client_alone",
    ("get", "get_validated_ref"): "test_put_object_and_get_object",
    ("_create_reference", "write_ref"): "test_put_object_and_get_object",
    ("_create_delta", "has_ref"): "test_the_service_says_that_it_hit",
    ("_create_delta", "_cache_reference"): "test_cp_encodes_and_decodes_with_the_cached_reference",
    ("_create_delta", "get_validated_ref"): "test_the_service_says_that_it_hit",
    ("_cache_reference", "write_ref"): "test_install_leaves_other_caches_alone",
    ("_delete_reference", "evict"): "test_deletion_of_a_deltaspace_frees_its_reference",
    ("_delete_delta", "evict"): "test_deletion_of_a_deltaspace_frees_its_reference",
    ("delete_recursive", "evict"): "test_rm_of_a_deltaspace_frees_its_reference",
    ("clear_cache", "clear"): "test_clear_cache_forgets_in_this_client_alone",
}
"""Where DeltaGlider 6.2.0 uses its cache (function, what it calls), and a test that goes there.

Everything else reaches the cache through these: the CLI's cp, sync, migrate and verify, and the
SDK's uploads, downloads and rehydration, end in `put` and `get`.
"""


@both
def test_every_method_of_the_sdk_uses_the_cache(
    s3: S3Server, daemon: Settings, tmp_path: Path, on_daemon: bool
) -> None:
    """The methods are in sdk_usage.py, which runs inside DeltaGlider's environment."""
    run_suite(
        "sdk_usage.py",
        *("-k", "not two_endpoints"),
        daemon=daemon if on_daemon else None,
        cwd=tmp_path,
        environment=s3.environment({"TEST_S3_ENDPOINTS": s3.url}),
    )


def test_no_usage_point_is_left_out() -> None:
    """The installed DeltaGlider's source has these calls and no others, and the tests exist."""
    (package,) = ENVIRONMENT.parent.glob("lib/python3.*/site-packages/deltaglider")
    found = {
        point
        for path in package.rglob("*.py")
        if path.parent.name not in {"adapters", "ports"}  # the caches themselves
        for point in _uses_of_the_cache(ast.parse(path.read_text()))
    }
    assert found == set(USAGE_POINTS)
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("*.py"))
    for name in USAGE_POINTS.values():
        assert f"def {name}(" in tests


def _uses_of_the_cache(module: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield (function, method) of `….cache.method(…)`, of fetches, and of caches that are made."""
    for function in ast.walk(module):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            method, owner = node.func.attr, ast.unparse(node.func.value)
            if owner.endswith(".cache") or (owner, method) in {
                ("self", "_cache_reference"),
                ("EncryptedCache", "from_env"),
            }:
                yield function.name, method
