"""How each kind of model shows its sites, one kind per file."""

from repshift_cli.reduction.families.base import Family, Probe, Site, Stream, families, match, nothing

__all__ = ["Family", "Probe", "Site", "Stream", "families", "match", "nothing"]
