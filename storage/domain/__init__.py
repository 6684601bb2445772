"""What a host does in its cluster's domain on a point. Read first: domain, session, reader."""
