"""The client's settings, and the one place where the SDK reads the environment."""

import os
from typing import Any

from dgcache_core.settings import ClientSettings, resolve


class Settings(ClientSettings):
    """How the cache is used; `Settings()` has the defaults and reads nothing.

    Raises:
        SettingsError: a value is out of range; the message names the setting.
    """

    @classmethod
    def from_environment(cls, **overrides: Any) -> "Settings":
        """Return settings from `DG_CACHE_*` variables; an override beats its variable.

        Args:
            overrides: fields by name, for example `fallback_size_mb=0.5` (MiB, with fractions).

        Raises:
            SettingsError: a value does not parse, is out of range, or an override is unknown.
        """
        return resolve(cls, os.environ, overrides).settings
