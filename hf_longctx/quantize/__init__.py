"""`hf-longctx quantize`: a model on the disk, a few texts, and a quantized model on the disk."""
