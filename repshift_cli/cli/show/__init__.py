"""Print reports."""
