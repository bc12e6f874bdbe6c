"""Checkpoints of other projects: Hugging Face, PEFT and T5X, in and out."""
