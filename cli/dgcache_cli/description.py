"""A daemon's Status in words: what it holds, what it saved, and what protects it, a line each.

It says what is in effect; `diagnosis` judges that.
"""

from typing import Any

from dgcache_cli.output import human_seconds, human_size


def described(status: dict[str, Any]) -> list[tuple[str, str]]:
    """Return names and texts, in the order in which they are shown."""
    store, hardening = status["store"], status["hardening"]
    used = store["blob_bytes"] + store["handout_bytes"] + store["reserved_bytes"]
    supervised = "under systemd" if status["supervisor"] == "systemd" else "on its own"
    asked = store["hits"] + sum(store["misses"].values())
    misses = ", ".join(f"{count} {reason}" for reason, count in sorted(store["misses"].items()))
    return [
        ("dg-cached", f"{status['build']}, pid {status['pid']}, {supervised}"),
        ("up for", human_seconds(status["uptime_seconds"])),
        ("directory", status["directory"]),
        ("logs to", status["log"]),
        (
            "memory",
            f"{human_size(used)} of {human_size(store['max_bytes'])}: "
            f"{human_size(store['blob_bytes'])} encrypted, "
            f"{human_size(store['handout_bytes'])} held by clients, "
            f"{human_size(store['reserved_bytes'])} in progress",
        ),
        ("pressure", _pressure(status["pressure"], store)),
        ("disk", _disk(status["disk"])),
        (
            "references",
            f"{store['entries']} for {store['bindings']} deltaspaces; "
            f"largest possible {human_size(store['max_entry_bytes'])}",
        ),
        ("saved", f"{store['hits']} GETs, {human_size(store['hit_bytes'])}"),
        (
            "hits",
            f"{store['hits']} of {asked} lookups, {store['shared_hits']} without a decryption",
        ),
        ("misses", misses or "none"),
        (
            "stores",
            f"{store['stores']} ({human_size(store['stored_bytes'])}), "
            f"{store['refused_stores']} refused, {store['evictions']} evicted, "
            f"{store['expirations']} expired, {store['corruptions']} corrupt",
        ),
        (
            "clients",
            f"{status['sessions']} sessions, {status['connections']} connections, "
            f"{status['stores_in_progress']} stores and {status['reads_in_progress']} byte "
            "streams in progress",
        ),
        ("fetches", _fetches(status["leases"])),
        (
            "protection",
            f"keys in {hardening['keys']}, "
            f"{'dumpable' if hardening['dumpable'] else 'not dumpable'}, "
            f"core limit {hardening['core_limit_bytes']} B, umask {hardening['umask']:04o}",
        ),
        ("confined", _confined(hardening)),
        *_modes(hardening.get("directory_modes", {})),
        ("watched by", _monitor(status["monitor"])),
        ("security", _security(status["security_events"])),
    ]


def _modes(modes: dict[str, int]) -> list[tuple[str, str]]:
    """One line about the directories of the daemon."""
    said = ", ".join(f"{mode:04o} {directory}" for directory, mode in sorted(modes.items()))
    return [("modes", said)] if said else []


def _confined(hardening: dict[str, Any]) -> str:
    """One line about what is in effect; `doctor` judges it."""
    if not hardening.get("kernel"):
        return "unknown: an older dg-cached runs, see dg-cache restart"
    refuses = ", ".join(hardening["landlock_refuses"])
    parts = [
        f"Landlock ABI {hardening['landlock_abi']} ({refuses})" if refuses else "no Landlock",
        "no new privileges" if hardening["no_new_privileges"] else "new privileges possible",
        "no capabilities" if not hardening["capabilities"] else "capabilities",
        "filtered system calls" if hardening["filters_system_calls"] else "any system call",
        "own user namespace" if hardening["user_namespace"] else "no user namespace of its own",
        f"/ {'read-only' if hardening['root_read_only'] else 'writable'}",
        f"home {hardening['home']}",
        "network" if hardening["network"] else "no network",
        f"swap to {hardening['swap']}" if hardening["swap"] else "no swap",
    ]
    return f"{'; '.join(parts)}: see dg-cache doctor"


def _fetches(leases: dict[str, Any]) -> str:
    if not leases:
        return "unknown: an older dg-cached runs, see dg-cache restart"
    return (
        f"{leases['held']} in progress, {leases['waiting']} waiting for them; "
        f"{leases['saved']} GETs saved by waiting"
    )


def _monitor(monitor: dict[str, Any]) -> str:
    if not monitor:
        return "nothing: an older dg-cached runs, see dg-cache restart"
    watched = f"{monitor['mechanism']}, {monitor['watched_directories']} directories"
    rescans = f", {monitor['rescans']} rescans" if monitor["rescans"] else ""
    reason = f"; {monitor['disabled_reason']}" if monitor["disabled_reason"] else ""
    return watched + rescans + reason


def _security(counts: dict[str, int]) -> str:
    if not counts:
        return "no events"
    by_kind = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    return f"{by_kind}: see dg-cache events"


def _disk(disk: dict[str, Any]) -> str:
    """One line about the disk tier."""
    if not disk:
        return "no disk tier (DG_CACHE_DISK_SIZE_MB)"
    if not disk["enabled"]:
        return f"switched off: {disk['disabled_reason']}"
    life = "outlives the daemon" if disk["persistent"] else "ends with the daemon"
    return (
        f"{human_size(disk['bytes'])} of {human_size(disk['max_bytes'])}, "
        f"{disk['entries']} references; {disk['loads']} came back, {disk['evictions']} evicted, "
        f"{disk['corruptions']} corrupt; {life}"
    )


def _pressure(pressure: dict[str, Any], store: dict[str, Any]) -> str:
    """One line about memory pressure; a daemon of an older version says nothing of it."""
    if not pressure:
        return "unknown"
    by = "alarms and samples" if pressure["psi"] else "samples"
    if not pressure["shrinks"]:
        return f"none so far; watched by {by}"
    limit, budget = pressure["limit_bytes"], store["max_bytes"]
    now = f"limited to {human_size(limit)} of" if limit < budget else "over, again"
    return (
        f"{now} {human_size(budget)}; lowered {pressure['shrinks']} times, "
        f"{store['pressure_evictions']} evicted, the last "
        f"{human_seconds(pressure['seconds_since'])} ago: {pressure['cause']}"
    )
