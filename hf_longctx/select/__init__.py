"""Which blocks of keys are read: summaries, scorers and budgets, and the choice that they make."""
