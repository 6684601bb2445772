"""A point that somebody else fills, to the last byte and nearly: who deletes makes room."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.config import Config, Limits, PointConfig
from storage.errors import PointFull
from storage.files.ballast import BALLAST_BYTES, ballast_size
from storage.lmdb_env.lock_file import READERS
from storage.view.view import View
from tests.conftest import LoopFs
from tests.engine_rig import ANYWHERE, EngineRig
from tests.fire.hog import filled, free_bytes
from tests.fire.site import Site, changed, noise
from tests.rig import random_bytes
from tests.store import Saved, files, live_files, require_rebuilt_alike

KIB, MIB = 1 << 10, 1 << 20
SIZES = {"ext4": 64 * MIB, "xfs": 320 * MIB}
# From nothing at all, by the block, to more than a backup needs.
LEVELS = [0, *(4 * KIB << shift for shift in range(11)), 12 * MIB]
IMAGE_CHUNKS = 24

pytestmark = pytest.mark.root


@pytest.fixture(params=["ext4", "xfs"])
def place(request: pytest.FixtureRequest, loop_fs: LoopFs) -> Path:
    return loop_fs(request.param, SIZES[request.param])


@pytest.fixture
def site(place: Path, tmp_path: Path) -> Iterator[Site]:
    memory = tmp_path / "memory"
    memory.mkdir()
    made = Site(place, memory)
    yield made
    made.domain.close()


def try_to_save(site: Site, image: bytes, parent: Saved) -> bool:
    """Whether the backup was acknowledged; if not, there was no room."""
    try:
        site.save(image, parent)
    except PointFull:
        return False
    return True


def test_somebody_elses_room_is_back_when_the_file_system_says_so(
    loop_fs: LoopFs, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = loop_fs("ext4", 16 * MIB)
    asked: list[Path] = []

    def late(place: Path) -> int:
        asked.append(place)
        return 0 if 1 < len(asked) < 5 else free_bytes(place)

    monkeypatch.setattr("tests.fire.hog.free_bytes", late)
    with filled(place):
        pass
    assert len(asked) == 5


def test_at_every_fill_level(site: Site, place: Path) -> None:
    """Backups fail cleanly or succeed; deletes, restores and gc work; then backups do again."""
    outcomes = []
    images = [noise(IMAGE_CHUNKS, 1)]
    kept = site.save(images[0])
    for level in LEVELS:
        doomed = site.save(noise(IMAGE_CHUNKS, 100 + level), None)
        site.save(changed(images[0], 3, level), kept)
        with filled(place, level):
            outcomes.append(try_to_save(site, changed(images[0], 16, 7 + level), kept))
            site.require_truth()
            site.forget(doomed)
            report = site.domain.reclaim()
            assert report.packs_removed
            site.require_truth()
            site.reopen()
            site.require_truth()
        site.save(changed(images[0], 5, 9 + level), kept)
        for saved in [saved for saved in site.truth if saved != kept]:
            site.forget(saved)
        site.domain.reclaim(sparse_below=1.0)
        site.require_truth()
        site.check()
        assert files(site.domain) == live_files(site.domain)
    require_rebuilt_alike(site.domain)
    assert outcomes[0] is False
    assert outcomes[-1] is True


def test_deleting_everything_one_by_one_with_nothing_free(site: Site, place: Path) -> None:
    """The ballast serves more than once: what each delete frees is somebody else's at once."""
    saved = [site.save(noise(IMAGE_CHUNKS, seed)) for seed in range(8)]
    for number, one in enumerate(saved):
        with filled(place):
            site.forget(one)
            assert site.domain.reclaim(copy_budget_bytes=0).packs_removed
            assert free_bytes(place) > 0
        if number % 3 == 0:
            site.reopen()
        site.require_truth()
    site.check()


def test_the_ballast_comes_back_when_there_is_room(site: Site, place: Path) -> None:
    ballast = Path(site.domain.paths.ballast)
    whole = ballast.stat().st_size
    assert whole == ballast_size(10**12, 10**12, 0) or whole >= MIB
    assert ballast.stat().st_blocks * 512 >= whole
    one = site.save(noise(4, 1))
    with filled(place):
        site.forget(one)
        assert not ballast.exists() or ballast.stat().st_size < whole
    site.domain.reclaim()
    assert ballast.stat().st_size == whole
    ballast.unlink()  # nobody needs it to be there
    site.require_truth()
    site.reopen()
    assert ballast.stat().st_size == whole


def test_without_ballast_a_full_point_says_so(site: Site, place: Path) -> None:
    one = site.save(noise(4, 1))
    os.unlink(site.domain.paths.ballast)

    def read_on() -> None:
        for _ in range(50):  # the last blocks of directories and the view have some room left
            site.domain.begin("read", [one.backup]).end()

    with filled(place), pytest.raises(PointFull):
        read_on()
    site.require_truth()
    site.check()


def test_a_view_on_a_full_file_system_never_ends_the_process(place: Path) -> None:
    """LMDB writes to its lock file through memory: a page without room behind it is SIGBUS."""
    view = View(str(place / "view"), b"x")
    view.close()
    with filled(place):
        with pytest.raises(PointFull):
            View(str(place / "other"), b"x")
        view = View(str(place / "view"), b"x")
        inside = threading.Barrier(READERS // 4 + 1)

        def read() -> None:
            with view.read():
                inside.wait()

        threads = [threading.Thread(target=read) for _ in range(READERS // 4)]
        for thread in threads:
            thread.start()
        inside.wait()
        for thread in threads:
            thread.join()
        view.close()


def test_the_service_deletes_from_a_full_point(place: Path, tmp_path: Path) -> None:
    limits = Limits(point_reserve_bytes=0, point_refresh_s=0.05)
    config = Config(limits=limits, points=(PointConfig("small", str(place)),))
    with EngineRig(tmp_path / "data", config) as rig:
        vm = rig.make_vm("web", random_bytes(4 * MIB, 1))
        kept = rig.back_up(vm)
        other = rig.back_up(rig.make_vm("db", random_bytes(4 * MIB, 2)))
        with filled(place):
            _, job = rig.ask_backup(vm, full=True)
            assert rig.ended(job).state == "failed"
            rig.restart()
            packs = set(place.glob("domains/*/packs/*/*"))
            rig.engine.delete_backup(ANYWHERE, other.uuid)
            assert set(place.glob("domains/*/packs/*/*")) < packs
            assert rig.restore(kept, "copy") == [random_bytes(4 * MIB, 1)]
            rig.succeed(rig.engine.start_maintenance("gc", rig.point_uuid, deep=False))
        rig.back_up(vm, full=True)
        rig.succeed(rig.engine.start_maintenance("verify", rig.point_uuid, deep=True))


@pytest.mark.parametrize(
    ("capacity", "free", "view", "size"),
    [
        (1 << 40, 1 << 40, 0, BALLAST_BYTES),
        (1 << 40, 1 << 40, 3 << 30, 3 << 30),
        (1 << 30, 1 << 30, 3 << 30, (1 << 30) // 50),
        (1 << 40, 6 * MIB, 0, 3 * MIB),
        (1 << 40, 100 * KIB, 0, 0),
        (0, 0, 0, 0),
    ],
)
def test_its_size(capacity: int, free: int, view: int, size: int) -> None:
    assert ballast_size(capacity, free, view) == size
