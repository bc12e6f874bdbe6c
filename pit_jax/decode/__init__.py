"""Answers sampled from, and scores given by, frozen parameters: cached decoding and fixed-size batches."""
