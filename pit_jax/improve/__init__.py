"""Improvement of answers at inference: the loop, its accept rule, and the baselines it is compared with."""
