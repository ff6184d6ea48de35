"""`relay doctor`: whether this machine can do what a recipe wants, shown by doing it on a small scale."""
