"""The recipe: one typed, frozen, torch-free schema per stage kind."""
