"""The client's settings, and the one place where the SDK reads the environment."""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from dgcache_core.settings import ClientSettings, Resolved
from dgcache_core.settings_files import read_settings

_PATIENT_MS = 2000


class Settings(ClientSettings):
    """How the cache is used; `Settings()` has the defaults and reads nothing.

    Raises:
        SettingsError: a value is out of range; the message names the setting.
    """

    @classmethod
    def from_environment(cls, **overrides: Any) -> "Settings":
        """Return settings from `DG_CACHE_*` variables and the settings files.

        An override beats its variable, that the user's file, that the administrator's; his ceilings
        hold for all of them. What is to be said goes to the logger `dgcache`.

        Args:
            overrides: fields by name, for example `fallback_size_mb=0.5` (MiB, with fractions).

        Raises:
            SettingsError: a value is wrong, an override is unknown, or a file cannot be trusted.
        """
        resolved = cls.resolved(**overrides)
        if resolved.findings:
            import logging  # 19 ms, in most calls for nothing

            for finding in resolved.findings:
                logging.getLogger("dgcache").info("%s", finding)
        return resolved.settings

    def for_one_shot(self) -> "Settings":
        """Return the same for a process that makes few calls: its transport, unless one is set."""
        return dataclasses.replace(self, transport=self.transport or "auto")

    def patient(self) -> "Settings":
        """Return the same for somebody to whom doing without the daemon is dear, as a download is.

        On a busy host a daemon that serves may not get the CPU for longer than the default; one
        that is absent is known to be at once, so this waits at least 2 s for one that is there.
        """
        budget = max(_PATIENT_MS, self.connect_timeout_ms)
        return dataclasses.replace(self, connect_timeout_ms=budget)

    @classmethod
    def resolved(cls, **overrides: Any) -> "Resolved[Settings]":
        """Return the same with the origin of each value, and say nothing."""
        resolved = read_settings(cls, os.environ, overrides)
        findings = (*resolved.findings, *_left_over(resolved))
        return dataclasses.replace(resolved, findings=findings)


def _left_over(resolved: Resolved[Settings]) -> Iterator[str]:
    """Name what was set for DeltaGlider's own cache, as its documents advise."""
    settings, origins = resolved.settings, resolved.origins
    if settings.backend != "dg-cached" and origins["backend"].startswith("environment "):
        yield (
            f"DG_CACHE_BACKEND={settings.backend}: the in-process cache is used, so that nothing "
            "is shared; unset it to use dg-cached"
        )
    if not settings.encryption:
        yield "DG_CACHE_ENCRYPTION=false changes nothing, every cache encrypts; unset it"
