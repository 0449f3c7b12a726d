"""Every method of DeltaGlider's SDK that needs a reference takes it from the cache."""

from pathlib import Path

from benchmarks.testbed import S3Server

from dgcache import Settings
from tests.deltaglider.conftest import run_suite
from tests.deltaglider.usage import both


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
