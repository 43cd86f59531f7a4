"""What the plugin costs, and what it saves. Figures are ratios of interleaved pairs in one run."""
