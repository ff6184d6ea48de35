"""Talking to what stages published: in the terminal, or a file of prompts at once."""
