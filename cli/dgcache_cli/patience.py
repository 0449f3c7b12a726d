"""How these commands ask the daemon, which is what they are about."""

import dataclasses

from dgcache import Settings

_PATIENT_MS = 2000


def patient(settings: Settings) -> Settings:
    """Return settings for somebody who asks for the daemon, once: it may take its time."""
    budget = max(_PATIENT_MS, settings.connect_timeout_ms)
    return dataclasses.replace(settings.for_one_shot(), connect_timeout_ms=budget)
