"""What is trained on top of a base: building, loading and saving adapters."""
