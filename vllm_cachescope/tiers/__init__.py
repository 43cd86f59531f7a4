"""Remote tiers: KV blocks in a store outside the engine, whatever store that is."""
