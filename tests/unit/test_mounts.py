from __future__ import annotations

import pytest

from storage.errors import PointUnsafeMount
from storage.files.mounts import check_mount, require_sound_mount

ROOT = "22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw,discard\n"
GOOD = (
    "rw,vers=4.2,rsize=1048576,wsize=1048576,namlen=255,hard,proto=tcp,nconnect=4,timeo=600,"
    "retrans=2,sec=sys,clientaddr=10.0.0.2,local_lock=none,lookupcache=pos,addr=10.0.0.1"
)


def nfs(options: str, own: str = "rw,relatime", where: str = "/backup") -> str:
    return ROOT + f"40 22 0:50 / {where} {own} shared:9 - nfs4 10.0.0.1:/export {options}\n"


def test_a_local_mount_is_sound() -> None:
    verdict = check_mount("/srv/point", ROOT)
    assert (verdict.kind, verdict.problem) == ("local", "")


def test_a_good_nfs_mount_is_sound() -> None:
    verdict = check_mount("/backup/point", nfs(GOOD))
    assert (verdict.kind, verdict.problem) == ("nfs", "")
    assert require_sound_mount("/backup", nfs(GOOD)) == verdict


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (GOOD.replace("hard", "soft"), "hard"),
        (GOOD.replace("hard", "softerr"), "hard"),
        (GOOD.replace("hard,", ""), "hard"),
        (GOOD + ",soft", "hard"),
        (GOOD.replace("vers=4.2", "vers=4.0"), "4.1 or later"),
        (GOOD.replace("vers=4.2", "vers=4"), "4.1 or later"),
        (GOOD.replace("vers=4.2", "vers=3"), "4.1 or later"),
        (GOOD.replace("vers=4.2,", ""), "4.1 or later"),
        (GOOD.replace("vers=4.2", "vers=x"), "4.1 or later"),
        (GOOD + ",nolock", "locks"),
        (GOOD.replace("local_lock=none", "local_lock=all"), "locks"),
        (GOOD.replace("local_lock=none", "local_lock=flock"), "locks"),
        (GOOD.replace(",local_lock=none", ""), "locks"),
    ],
)
def test_an_unsafe_nfs_mount_is_refused_with_the_reason(options: str, reason: str) -> None:
    verdict = check_mount("/backup", nfs(options))
    assert verdict.kind == "nfs"
    assert reason in verdict.problem
    with pytest.raises(PointUnsafeMount, match=f"^/backup: .*{reason}"):
        require_sound_mount("/backup", nfs(options))


@pytest.mark.parametrize("version", ["vers=4.1", "vers=4.10", "vers=5.0", "vers=4,minorversion=1"])
def test_versions_that_will_do(version: str) -> None:
    assert not check_mount("/backup", nfs(GOOD.replace("vers=4.2", version))).problem


def test_what_only_costs_time_is_no_problem() -> None:
    assert not check_mount("/backup", nfs(GOOD.replace(",lookupcache=pos", ""), own="ro")).problem


@pytest.mark.parametrize("fs_type", ["cifs", "9p", "ceph", "fuse.sshfs"])
def test_other_network_file_systems_are_refused(fs_type: str) -> None:
    text = ROOT + f"40 22 0:50 / /backup rw - {fs_type} //server/share rw,vers=3.1.1\n"
    assert fs_type in check_mount("/backup", text).problem


@pytest.mark.parametrize("fs_type", ["tmpfs", "overlay", "fuse.mergerfs"])
def test_other_local_file_systems_are_the_operators_to_choose(fs_type: str) -> None:
    verdict = check_mount("/backup", ROOT + f"40 22 0:50 / /backup rw - {fs_type} none rw\n")
    assert (verdict.kind, verdict.problem) == ("local", "")


def test_only_whole_path_components_count() -> None:
    assert check_mount("/backup2", nfs("soft")).kind == "local"
    assert check_mount("/backup/x", nfs("soft")).kind == "nfs"


def test_the_innermost_mount_counts() -> None:
    text = nfs("soft") + "41 40 254:2 / /backup/local rw - xfs /dev/vdb rw\n"
    assert check_mount("/backup/local/point", text).kind == "local"
    assert check_mount("/backup/locality", text).kind == "nfs"


def test_a_mount_hides_those_made_before_it() -> None:
    below = nfs(GOOD, where="/a/b")
    over_the_parent = below + "50 22 254:3 / /a rw - xfs /dev/vdc rw\n"
    assert check_mount("/a/b/point", over_the_parent).kind == "local"
    on_top = below + "51 40 254:3 / /a/b rw - xfs /dev/vdc rw\n"
    assert check_mount("/a/b/point", on_top).kind == "local"


def test_the_first_mount_of_all_is_its_own_parent() -> None:
    text = "1 1 0:2 / / rw - rootfs rootfs rw\n" + nfs("soft")
    assert check_mount("/backup", text).kind == "nfs"
    assert check_mount("/", text.splitlines()[0]).problem == ""


def test_the_order_of_lines_does_not_matter() -> None:
    text = nfs(GOOD) + "41 40 254:2 / /backup/local rw - xfs /dev/vdb rw\n"
    turned = "".join(reversed(text.splitlines(keepends=True)))
    assert check_mount("/backup/local", turned) == check_mount("/backup/local", text)


def test_escaped_mount_points() -> None:
    text = nfs("soft", where="/back\\040up\\134x")
    assert check_mount("/back up\\x/point", text).kind == "nfs"


def test_unreadable_text_is_refused() -> None:
    for text in ("", "nonsense\n", "22 1 254:1 / / rw\n", "a - b\n"):
        assert "no mount" in check_mount("/backup", text).problem


def test_this_machine() -> None:
    with open("/proc/self/mountinfo", encoding="utf-8") as text:
        assert check_mount("/proc", text.read()).kind == "local"
