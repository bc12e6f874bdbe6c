"""From text to token ids and back: tokenizers, prompt templates and dialogue formats; no TensorFlow."""
