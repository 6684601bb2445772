"""`python -m api.cli` is `vmkeep`, for where the package is not installed."""

from api.cli import main

main()
