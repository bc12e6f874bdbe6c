"""Types, metrics, randomness and errors shared by everything; needs jax and numpy only."""
