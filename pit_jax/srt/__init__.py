"""Self-Refinement Tuning (SRT, arXiv 2406.07168): a model that criticises and refines its own answers in one go."""
