"""Remote tiers: KV blocks in a store outside the engine, whatever store that is.

A block here is what a tier behind the device keeps under one key. The engine and the metrics call
it a chunk: one or several of the device's blocks.
"""
