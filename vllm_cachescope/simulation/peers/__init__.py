"""Policies of eviction from the literature, to compare with."""
