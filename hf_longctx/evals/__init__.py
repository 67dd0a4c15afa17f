"""Needle grid, pass keys, RULER tasks and perplexity, and the real model and text that they run on."""
