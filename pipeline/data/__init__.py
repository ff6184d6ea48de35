"""Read, recognise, split and encode training data."""
