"""Files, checkpoints, metrics and progress: everything with an effect outside the process."""
