"""Replies of one stage beside those of another on held-out prompts, scored by reward models and by a rule."""
