"""Attention operations and their backends. Imports torch only."""
