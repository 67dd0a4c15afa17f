"""Data to train a vision-language model for streams. Importing it loads nothing heavy."""
