"""What the benchmarks of speed share: shapes, work, counts, clocks and records."""
