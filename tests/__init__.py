"""All tests. `python -m tests` runs them (tests/__main__.py says how), and so does any pytest.

    unit         one module of the product at a time
    contract     the same tests for every implementation of a seam: the file system, the tables
    property     a domain against plain copies of its images, whatever is done in whatever order
    model        the log's protocol: every interleaving of those who follow it
    crash        power failures and failing calls at every call, on a simulated disk
    fire         the same below real file systems; and these hung, full, gone, with bad sectors
    damage       wrong bytes in a point, a view or the state
    hostile      input that somebody made up: requests, configurations, other clusters' domains
    golden       a point as each version of the format wrote it
    integration  the engine, the API and the command line, each as a whole
    nbd, qemu, libvirt, nfs    with the real servers, tools and kernels

What they work with: `store` (storage alone, and images in memory), `rig` (backups and restores of
volumes, without an engine; `tracking_rig`), `engine_rig` (an engine), `api_site` (a server over an
engine). `simdisk`, `simfs` and `simnfs` lose what a real disk or client may lose; `failing_fs` is
the real file system with a call that fails. `forging` writes a point's files by docs/design.md
alone, without the code. `soak` is the long form of all of it.
"""
