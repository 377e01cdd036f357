"""Importance scores of tokens, one per file."""

from repshift_cli.reduction.metrics.base import Metric, SiteContext, build_metric, metric_kinds

__all__ = ["Metric", "SiteContext", "build_metric", "metric_kinds"]
