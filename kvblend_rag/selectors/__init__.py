"""Which reused tokens are recomputed: one file a method, found by name."""
