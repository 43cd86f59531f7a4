"""Fleets: replicas behind the routers that fleets run, and what agents get from them."""
