"""HTTP and command line over the engine. The only async code. Read first: server, app, calls."""

VERSION = "0.1.0"
