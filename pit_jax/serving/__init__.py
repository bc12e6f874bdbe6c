"""An OpenAI-compatible server for an improver."""
