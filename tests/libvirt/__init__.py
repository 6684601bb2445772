"""vmkeep on a real libvirt: tests of the whole way, with a small Linux guest under emulation."""
