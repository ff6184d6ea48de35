"""A published stage as a folder that other programs open: the model, its card, GGUF, the hub."""
