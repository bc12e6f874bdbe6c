"""Optimisers, the training step and the one loop that all training stages share."""
