"""What all remote tiers share: a second home for KV outside the engine's machine."""
