"""The units as they stand in the tree: what one of them has in common with another."""

from pathlib import Path

import pytest

SYSTEMD = Path(__file__).resolve().parents[1] / "systemd"
Directive = tuple[str, str, str]

OF_THE_USER: set[Directive] = {
    ("Unit", "Description", "dg-cached, the cache of delta references"),
    ("Unit", "Requires", "dg-cached.socket"),
    ("Unit", "After", "dg-cached.socket"),
    # a user may remove the directory of the sockets; the system's manager makes it
    ("Service", "ReadWritePaths", "-%t/dg-cached"),
    ("Install", "Also", "dg-cached.socket"),
}
OF_THE_TEMPLATE: set[Directive] = {
    ("Unit", "Description", "dg-cached of uid %i"),
    ("Unit", "Requires", "dg-cached@%i.socket"),
    ("Unit", "After", "dg-cached@%i.socket nss-user-lookup.target"),
    ("Service", "User", "%i"),
    ("Service", "Slice", "dgcached.slice"),
    ("Service", "CacheDirectory", "dg-cached/%i"),
    ("Service", "CacheDirectoryMode", "0700"),
    ("Service", "Environment", "DG_CACHE_DIR=%C/dg-cached/%i"),
    ("Service", "LoadCredential", "dg-cache-key:dg-cache-key.%i"),
    ("Service", "ReadWritePaths", "/run/dg-cached/%i"),
    ("Install", "WantedBy", "multi-user.target"),
    ("Install", "Also", "dg-cached@%i.socket"),
}
SOCKETS_OF_THE_USER: set[Directive] = {
    ("Unit", "Description", "dg-cached sockets"),
    ("Unit", "ConditionPathExists", "@DG_CACHED@"),
    ("Socket", "ListenStream", "%t/dg-cached/rpc.sock"),
    ("Socket", "ListenSequentialPacket", "%t/dg-cached/session.sock"),
    ("Socket", "DirectoryMode", "0700"),
}


def directives(name: str) -> list[Directive]:
    """Return section, name and value of each directive, in their order."""
    found, section = [], ""
    for line in (SYSTEMD / name).read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and line[0] not in "#;":
            directive, is_assignment, value = line.partition("=")
            assert is_assignment, line
            found.append((section, directive, value))
    return found


@pytest.mark.parametrize(
    ("one", "other", "only_one", "only_other"),
    [("dg-cached.service", "dg-cached@.service", OF_THE_USER, OF_THE_TEMPLATE)],
)
def test_user_unit_and_template_differ_by_what_is_named_here_and_by_nothing_else(
    one: str, other: str, only_one: set[Directive], only_other: set[Directive]
) -> None:
    """A protection that one of them gets is forgotten in the other no more; order counts, too."""
    ours, theirs = directives(one), directives(other)
    assert set(ours) - set(theirs) == only_one
    assert set(theirs) - set(ours) == only_other
    assert [line for line in ours if line not in only_one] == [
        line for line in theirs if line not in only_other
    ]


def test_the_sockets_of_both_are_as_private_and_as_patient() -> None:
    """The template's directory is systemd's to make, and its condition is the service's."""
    ours = [line for line in directives("dg-cached.socket") if line not in SOCKETS_OF_THE_USER]
    assert [line for line in ours if line not in directives("dg-cached@.socket")] == []
    assert len(ours) >= 5


def test_the_drop_in_without_user_namespaces_takes_back_only_what_the_unit_says() -> None:
    """Each directive in it is one of the unit's, with another value."""
    said = {(section, name): value for section, name, value in directives("dg-cached.service")}
    for section, name, value in directives("drop-ins/no-user-namespaces.conf"):
        assert said[section, name] != value, name
