"""How these commands ask the daemon, which is what they are about."""

from dgcache import Settings


def patient(settings: Settings) -> Settings:
    """Return settings for somebody who asks for the daemon, once: it may take its time."""
    return settings.for_one_shot().patient()
