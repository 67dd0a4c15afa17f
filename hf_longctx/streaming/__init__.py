"""StreamingVLM sessions: frames in, rounds, captions out. Importing it loads nothing heavy."""
