"""Mirrors the folders: a test is found from the name of what it tests."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
