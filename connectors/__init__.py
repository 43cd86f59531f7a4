"""Adapters to what CacheScope does not own. Nothing else in the package imports vLLM, Redis or
LMCache."""
