"""Settings that must stand before any test's module is imported."""

import os
from pathlib import Path

if not Path("/dev/nvidia0").exists():  # before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")
