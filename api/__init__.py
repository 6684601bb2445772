"""HTTP and the command line, over the engine. The only async code. Read first: server, calls."""

VERSION = "0.1.0"
