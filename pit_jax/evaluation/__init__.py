"""Judges, win rates with intervals, and the report."""
