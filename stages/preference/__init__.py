"""Preference optimisation without a reward model: from pairs (dpo) and from labelled replies (kto)."""
