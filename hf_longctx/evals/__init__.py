"""Passkey, perplexity and the real model and text that they run on."""
