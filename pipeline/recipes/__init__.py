"""The recipes that ship with Relay, found by name."""
