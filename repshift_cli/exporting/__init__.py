"""Exports: a model, compressed or dense, as a file that runs without repshift. One file per format."""

from repshift_cli.exporting.base import TARGETS, Request, Target, default_output
from repshift_cli.exporting.job import Exported, check, export, open_for_export

__all__ = ["TARGETS", "Exported", "Request", "Target", "check", "default_output", "export", "open_for_export"]
