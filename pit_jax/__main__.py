"""`python -m pit_jax` is `pit-jax`."""

from pit_jax.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
