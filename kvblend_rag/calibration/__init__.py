"""What is known of how well one model blends: ``risk`` of one request, ``verdict`` on one model, beside the store.

How it comes to be known is in ``kvblend_rag.quality``: ``measure``, ``measurement``, ``judge``, ``fit``.
"""
