"""The same work as the benchmarks of speed, done by other projects."""
