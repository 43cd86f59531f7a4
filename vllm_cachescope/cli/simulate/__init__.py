"""``cachescope simulate``: what a cache of a given size would have read of recorded requests."""
