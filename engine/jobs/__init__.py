"""Long work in bounded threads. Read first: jobs."""
