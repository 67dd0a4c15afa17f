"""Weights in few bits, and fine-tunes as differences of one bit. Nothing here knows of attention or caches."""
