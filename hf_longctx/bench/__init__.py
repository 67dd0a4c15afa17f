"""What a model, or one operation, costs on this device under every method, beside dense and what others have."""
