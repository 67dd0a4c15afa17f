"""Weights of few bits. This room never meets attention: what it makes is a model like any other, for `patch` too."""
