"""Programs that measure; none of them is installed with the package."""
