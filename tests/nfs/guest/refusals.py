"""Checks in the VM: what is refused by name, and leaves no trace."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from engine.errors import EngineError
from engine.service import Engine
from storage.errors import StorageError
from tests.engine_rig import ANYWHERE
from tests.nfs.guest import server
from tests.nfs.guest.site import MIB, NfsRig, Site, clean, until
from tests.rig import random_bytes

UNSAFE = "point_unsafe_mount"


def refused(call: Callable[[], object]) -> EngineError | StorageError:
    """What the call was refused with."""
    try:
        call()
    except (EngineError, StorageError) as error:
        return error
    raise AssertionError("not refused")


def soft_mount_is_refused(site: Site) -> None:
    """A timeout of a soft mount loses writes silently. Also when the point is there already."""
    _unsound(site, {"soft": "soft", "softerr": "softerr"})


def other_unsound_mounts_are_refused(site: Site) -> None:
    """The oldest NFSv4, and locks kept at the client, as far as they can be mounted here."""
    _unsound(site, {"four": "vers=4.0,hard"})


def _unsound(site: Site, mounts: dict[str, str]) -> None:
    with NfsRig(site.local / "data", site.point) as rig:
        for name, options in mounts.items():
            with server.mounted(name, options) as place:
                old = place / site.point.relative_to(server.MOUNTED / "big")
                new = old.parent / name
                new.mkdir()
                for path in (old, new):
                    said = refused(partial(_attach, rig.engine, path))
                    assert said.code == UNSAFE, said
                assert os.listdir(new) == []
                site.note(f"{options}: {said}")


def _attach(engine: Engine, path: Path) -> str:
    return engine.create_point(path.name + "-again", "nfs", str(path))


def wrong_kind_is_refused(site: Site) -> None:
    """An NFS mount that is not there must not become a local point, nor the other way round."""
    (site.local / "empty").mkdir()
    with NfsRig(site.local / "data", site.point) as rig:
        sound = site.point.parent / "another"
        sound.mkdir()
        said = refused(lambda: rig.engine.create_point("a", "local", str(sound)))
        assert (said.code, "nfs, not local" in str(said)) == ("invalid_member", True), said
        said = refused(lambda: rig.engine.create_point("b", "nfs", str(site.local / "empty")))
        assert (said.code, "local, not nfs" in str(said)) == ("invalid_member", True), said
        assert os.listdir(sound) == os.listdir(site.local / "empty") == []


def read_only_mount(site: Site) -> None:
    """Backups and deletes are refused by name; what is there stays; it goes on afterwards."""
    with server.mounted("switched", server.SOUND) as place:
        point = place / site.point.relative_to(server.MOUNTED / "big")
        with NfsRig(site.local / "data", point) as rig:
            content = random_bytes(MIB, 1)
            vm = rig.make_vm("web", content)
            kept = rig.back_up(vm)
            server.run("mount", "-o", "remount,ro", str(place))
            for call in (
                lambda: rig.ask_backup(vm),
                lambda: rig.engine.delete_backup(ANYWHERE, kept.uuid),
            ):
                assert refused(call).code == "point_read_only"
            server.run("mount", "-o", "remount,rw", str(place))
            rig.core.points.look_again(rig.point_uuid, 60)
            until("it is online", lambda: rig.engine.point(rig.point_uuid).state == "online")
            rig.back_up(vm)
            assert rig.restore(kept, "copy") == [content]
        clean(point)
