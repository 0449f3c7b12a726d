"""Every bound of the daemon, in one place."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one user's clients can take of the daemon. Past a limit the daemon refuses; it never
    queues without an end."""

    connections: int = 256
    """Connections to rpc.sock at once."""
    sessions: int = 256
    """Sessions at once."""
    handshake_seconds: float = 5.0
    """From accept to the first byte, and again to the end of the HTTP/2 handshake."""
    relay_buffer_bytes: int = 256 << 10
    """Buffered in each direction of a relay before its source is paused."""
    inner_idle_seconds: float = 60.0
    """Without a connection to rpc.sock, before the inner gRPC server stops."""
    inner_change_seconds: float = 10.0
    """What it has to start or to stop in; it takes milliseconds."""
    calls_per_session: int = 16
    """Calls in progress in one session; more wait. Of those that come on the session's own socket,
    twice as many may be waiting or in progress; one more ends the session."""
    answer_bytes: int = 8 << 10
    """The longest response on a session's own socket; with the descriptors that nobody has read it
    must fit into `unread_descriptor_bytes`, which the kernel doubles."""
    alive_seconds: float = 2.0
    """How often a session hears that the daemon lives, while a call of it is in progress."""
    longest_call_seconds: float = 86_400.0
    """The longest deadline of a call on a session's own socket."""
    streams_per_connection: int = 32
    """HTTP/2 streams on one connection. Twice the calls: a client counts a stream as ended a moment
    before the server does, and a stream over the limit would be refused."""
    control_frames_per_second: int = 1000
    """HTTP/2 frames of one connection that are neither headers nor data nor windows; a client that
    sends more of them loses its connection."""
    message_bytes: int = 4 << 20
    """The largest gRPC message, in either direction."""
    unread_descriptor_bytes: int = 6 << 10
    """SO_SNDBUF of a session; the kernel doubles it and charges about 768 bytes for a descriptor
    that nobody has read yet, so it holds 16."""
    stores_at_once: int = 32
    """Stores in progress, over all sessions."""
    reads_at_once: int = 32
    """Streams of Read in progress, over all connections. One that nobody reads costs about 4 MiB in
    gRPC's buffers and the relay's, and lasts as long as its call."""
    deposits_per_session: int = 256
    """Stores a session began and neither committed nor aborted, those that failed included."""
    deposit_idle_seconds: float = 10.0
    """How long the writer of a deposit may pause."""
    deposit_bytes_per_second: int = 64 << 10
    """The slowest writer of a deposit that is waited for."""
    commit_seconds: float = 30.0
    """From the last byte of a deposit to its CommitStore."""
    lease_seconds: float = 600.0
    """How long the fetch of a missing reference may take before somebody else may, too."""
    ping_interval_ms: int = 1000
    """The shortest time between two HTTP/2 pings of one client that has a call open; one that pings
    faster loses its connection."""
    decryptions_at_once: int = 2
    """Lookups that decrypt at the same time."""
    refused_seconds: float = 60.0
    """After one refusal of a stranger is told, the next ones of the same user are only counted."""
    refused_most_seconds: float = 3600.0
    """The longest of these windows, which double while the user goes on."""
    refused_uids: int = 16
    """Users that are told apart so; the others share one window."""
    security_events_kept: int = 256
    """Security events for those who ask later, and before a slow follower loses one."""
    followers: int = 8
    """Watch calls that follow at once."""
    watch_mechanisms: Sequence[str] = ("fanotify", "inotify")
    """How the monitor watches, best first."""
    watched_directories: int = 16_384
    """Directories the monitor watches; each pins an inode in the kernel."""
    waiting_audits: int = 4096
    """Names with events that were not looked at yet; more, and everything is looked at."""
    audit_seconds: float = 60.0
    """From one audit of everything to the next."""
    rebinds_per_minute: int = 16
    """Sockets that somebody took away and the daemon made again, before it gives up."""
    drain_seconds: float = 10.0
    """What calls in progress get to finish after SIGTERM."""
    flush_seconds: float = 1.0
    """What their answers get, after that, to reach clients that read."""
    pressure_look_seconds: float = 5.0
    """Between two looks at the memory that is left, at the most, while something is cached."""
    pressure_calm_seconds: float = 30.0
    """Without memory pressure, before the cache may grow again."""
    pressure_step_seconds: float = 10.0
    """From one step of growing to the next."""
    disk_flush_seconds: float = 10.0
    """What writing memory to a disk tier that outlives the daemon gets at its end."""
    backlog: int = 1024
    """listen(2): with a full backlog a client's connect fails at once (unix(7))."""
