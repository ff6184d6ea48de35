"""One training program per stage kind; each reads top to bottom and starts under the `deepspeed` launcher."""
