"""The log protocol, explored state by state. Start with tests/model/search.py."""
