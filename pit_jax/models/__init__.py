"""Conditional language models behind one facade: decoder-only, encoder-decoder, and heads on top of them."""
