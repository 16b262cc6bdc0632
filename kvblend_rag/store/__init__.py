"""Where the KV of chunks lives: tiers of tensors by key, and the catalogue beside them."""
