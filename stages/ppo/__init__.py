"""Proximal policy optimisation: rollout, judge, update. `train` is the loop; the mathematics beside it is pure."""
