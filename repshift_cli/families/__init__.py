"""How each kind of model shows its sites, one kind per file."""

from repshift_cli.families.base import Family, Probe, Site, Stream, families, match

__all__ = ["Family", "Probe", "Site", "Stream", "families", "match"]
