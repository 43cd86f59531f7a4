"""Readers of vLLM's KV events that keep to the rules of the routers that read them."""
