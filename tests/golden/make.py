"""Makes the golden point of the current format. Run once per format version, never again for it.

    python -m tests.golden.make

A point that an old vmkeep wrote must stay readable for ever: so these files are never rewritten,
and this refuses to. The images are drawn from a seed; images() gives them anew for comparison.
"""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path

from storage.format.framing import FORMAT
from storage.point import ClusterLabel, Point
from tests.store import CHUNK, image_of, load, open_domain, patches, save

HERE = Path(__file__).parent
CLUSTER = ClusterLabel(
    cluster_uuid="0f1e2d3c-4b5a-4678-8796-a5b4c3d2e1f0", cluster_name="golden", cluster_mode="HCI"
)


def images() -> list[bytes]:
    """A full backup's image, its incremental's, and that of a later one that shares with both."""
    source = random.Random(1)
    dense, sparse = source.randbytes(3000) * 22, source.randbytes(64) * 1024
    first = image_of(dense[:CHUNK], 0, sparse, 7) + b"odd tail"
    patched = dense[: 3 * 4096] + bytes(4096) + dense[4 * 4096 : CHUNK]
    second = image_of(patched, sparse, 0, 8) + b"odd tail"
    third = image_of(8, 8, sparse)
    return [first, second, third]


def main() -> int:
    target = HERE / f"format{FORMAT}"
    if target.exists():
        print(f"{target.name} is there already and is never rewritten", file=sys.stderr)
        return 1
    target.mkdir()
    point = Point.create(str(target), "golden point", chunk_size=CHUNK)
    domain = open_domain(point, CLUSTER, "golden-host")
    first, second, third = images()
    gone = save(domain, image_of(9), label=b"forgotten")
    full = save(domain, first, label=b"full")
    save(domain, second, full, label=b"incremental")
    last = save(domain, third, label=b"later")
    domain.forget([gone.backup])
    domain.reclaim()
    domain.checkpoint()
    assert load(domain, last) == third
    assert len(patches(domain)) == 1
    domain.close()
    for made_anew in ("views", "tmp", "checkpoints"):
        shutil.rmtree(target / "domains" / CLUSTER.cluster_uuid / made_anew)
    return 0


if __name__ == "__main__":
    sys.exit(main())
