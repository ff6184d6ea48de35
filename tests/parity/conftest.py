"""Hypothesis keeps nothing in the working tree."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hypothesis.configuration import set_hypothesis_home_dir

set_hypothesis_home_dir(Path(tempfile.gettempdir()) / f"relay-hypothesis-{os.getuid()}")
