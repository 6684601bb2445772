"""Attached backup points: maintenance, and what others left there.

    points, keeper              all of them; the thread that keeps one open and looks after it
    upkeep, verify, pack_reads  maintenance as jobs; how far a deep verify has come
    distrust                    what is known to be damaged, over restarts
    remote                      what is on a point whoever made it, and importing of that

Read first: points, keeper.
"""
