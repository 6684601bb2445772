"""A domain against plain copies of the images, through any order of what can happen to it.

After each step every acknowledged backup restores bit for bit, the view equals one made anew from
log, footers and manifests (I8), and at the end a gc leaves exactly the live files (I9).
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from storage.check.check import check_point
from storage.domain.domain import Domain
from storage.point import ClusterLabel, Point
from storage.view import tables
from tests.store import (
    CHUNK,
    Saved,
    cluster,
    dump,
    files,
    live_files,
    load,
    new_point,
    open_domain,
    save,
)

CHUNKS = 40


class StorageMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        # Memory where there is some: thousands of fsyncs, and none of them is the point here.
        parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.directory = Path(tempfile.mkdtemp(prefix="vmkeep-machine-", dir=parent))

    @initialize()
    def start(self) -> None:
        self.point: Point = new_point(self.directory)
        self.labels: list[ClusterLabel] = [cluster("a"), cluster("b")]
        self.domains: list[Domain] = [
            open_domain(self.point, label, f"host-{at}") for at, label in enumerate(self.labels)
        ]
        self.saved: list[dict[Saved, bytes]] = [{}, {}]
        self.dead: list[set[str]] = [set(), set()]
        self.image = bytearray(CHUNKS * CHUNK + 100)

    @rule(seed=st.integers(0, 1 << 32), writes=st.integers(0, 12))
    def guest_writes(self, seed: int, writes: int) -> None:
        source = random.Random(seed)
        for _ in range(writes):
            start = source.randrange(-(-len(self.image) // CHUNK)) * CHUNK
            size = min(CHUNK, len(self.image) - start)
            kind = source.random()
            if kind < 0.25:
                content = bytes(size)
            elif kind < 0.6:
                content = bytes([source.randrange(1, 4)]) * size
            else:
                content = source.randbytes(size)
            self.image[start : start + size] = content

    @rule(chunks=st.integers(1, CHUNKS))
    def volume_is_resized(self, chunks: int) -> None:
        size = chunks * CHUNK + 100
        self.image = self.image[:size].ljust(size, b"\0")

    @rule(at=st.integers(0, 1), data=st.data())
    def back_up(self, at: int, data: st.DataObject) -> None:
        parents = [None, *self.saved[at]]
        parent = data.draw(st.sampled_from(parents))
        saved = save(self.domains[at], bytes(self.image), parent)
        self.saved[at][saved] = bytes(self.image)

    @precondition(lambda self: any(self.saved))
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        at = data.draw(st.sampled_from([at for at in (0, 1) if self.saved[at]]))
        count = data.draw(st.integers(1, min(3, len(self.saved[at]))))
        gone = data.draw(st.permutations(list(self.saved[at])))[:count]
        self.domains[at].forget([saved.backup for saved in gone])
        for saved in gone:
            del self.saved[at][saved]

    @precondition(lambda self: any(self.saved))
    @rule(at=st.integers(0, 1), data=st.data())
    def take_over(self, at: int, data: st.DataObject) -> None:
        theirs = self.saved[1 - at]
        if not theirs:
            return
        wanted = data.draw(st.lists(st.sampled_from(list(theirs)), min_size=1, unique=True))
        self.domains[at].import_backups(
            self.labels[1 - at].cluster_uuid,
            [saved.backup for saved in wanted],
            lambda _: b"imported",
        )
        for saved in wanted:
            self.saved[at][saved] = theirs[saved]

    @rule(at=st.integers(0, 1), share=st.sampled_from([0.3, 0.6, 0.95]))
    def collect_garbage(self, at: int, share: float) -> None:
        self.domains[at].reclaim(sparse_below=share)
        assert files(self.domains[at]) == live_files(self.domains[at])

    @rule(at=st.integers(0, 1))
    def only_unlink_the_dead(self, at: int) -> None:
        self.domains[at].reclaim(copy_budget_bytes=0)

    @rule(at=st.integers(0, 1))
    def publish_checkpoint(self, at: int) -> None:
        self.domains[at].checkpoint()

    @rule(at=st.integers(0, 1), lose_view=st.booleans())
    def reopen(self, at: int, lose_view: bool) -> None:
        domain = self.domains[at]
        domain.close()
        if lose_view:
            shutil.rmtree(domain.view.path)
        self.domains[at] = open_domain(self.point, self.labels[at], f"host-{at}")

    @rule(at=st.integers(0, 1))
    def make_view_anew(self, at: int) -> None:
        before = dump(self.domains[at])
        self.domains[at].rebuild()
        assert dump(self.domains[at]) == before

    @invariant()
    def the_dead_stay_dead(self) -> None:
        """So that what was proved once need not be proved again (storage.view.proof)."""
        for at, domain in enumerate(getattr(self, "domains", ())):
            rows = domain.view.ask(lambda state: dict(tables.packs.scan(state)))
            assert all(not row.live_chunks for pack, row in rows.items() if pack in self.dead[at])
            self.dead[at] |= {pack for pack, row in rows.items() if not row.live_chunks}

    @rule()
    def everything_restores(self) -> None:
        for domain, saved in zip(self.domains, self.saved, strict=True):
            assert {row.backup for row in domain.backups()} == {one.backup for one in saved}
            for one, image in saved.items():
                assert load(domain, one) == image

    def teardown(self) -> None:
        if hasattr(self, "domains"):
            self.everything_restores()
            for at in (0, 1):
                self.make_view_anew(at)
                self.collect_garbage(at, 0.6)
                self.domains[at].close()
            report = check_point(self.point.path, deep=True)
            assert not report.findings
        shutil.rmtree(self.directory)


TestStorageMachine = StorageMachine.TestCase
TestStorageMachine.settings = settings(
    max_examples=30,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
