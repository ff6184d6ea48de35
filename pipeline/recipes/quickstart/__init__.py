"""The self-contained quickstart recipe: its corpus, its rule and its tiny base model."""
