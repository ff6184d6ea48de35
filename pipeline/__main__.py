"""`python -m pipeline` is `relay`."""

from pipeline.cli import app

app()
