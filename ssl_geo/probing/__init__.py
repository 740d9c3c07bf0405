"""Frozen backbone to evidence: features, heads, metrics, baselines, report."""
