"""Folders of the project that tests read from."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
DOCS = ROOT / "docs"
VECTORS = TESTS / "vectors"
"""Reference vectors and stored artifacts."""
