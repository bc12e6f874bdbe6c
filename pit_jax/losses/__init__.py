"""Losses, advantages and divergences: arrays in, (total, weight) metrics out."""
