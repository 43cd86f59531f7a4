"""The simulation of caches: recorded requests replayed against policies of eviction."""
