"""BitDelta (arXiv:2402.10193): a fine-tune as signs and scales beside its base, many of them in one batch."""
