"""KV memory: what is kept, where it is read, and the cache that transformers sees."""
