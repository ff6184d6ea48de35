"""Base models, tokenizers, quantisation, and the roles that share one base."""
