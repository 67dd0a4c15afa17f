"""What is measured once on a model, stored as JSON, and read by methods."""
