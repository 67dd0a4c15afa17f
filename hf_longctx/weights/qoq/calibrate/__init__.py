"""From a model and a few texts to a QoQ model, layer by layer. What a loaded QoQ model needs is not in here."""
