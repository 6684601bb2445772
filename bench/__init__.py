"""The demo and the benchmarks: one question per file."""
