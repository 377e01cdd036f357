"""Latency, MACs, memory and the attention kernel in use."""
