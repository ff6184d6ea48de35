"""Choose the rows worth training on."""
