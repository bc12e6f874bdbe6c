"""The stages of PIT: each is a frozen dataclass with `run(run) -> dict[str, float]` that reads like the paper."""
