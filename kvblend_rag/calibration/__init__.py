"""What is known of how well one model blends, and how it came to be known.

Reading order: ``risk`` (one request), ``verdict`` (one model, beside the store), ``measurement`` and ``judge``
(from figures to a verdict).
"""
