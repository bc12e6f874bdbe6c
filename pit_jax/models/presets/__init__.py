"""Named model sizes."""
