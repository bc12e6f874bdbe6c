"""The `pit-jax` command: gin files and flags in, stages run, errors explained."""
