"""What blending keeps of the answers, measured on a running engine against a full prefill of the same prompts.

Reading order: ``questions`` (what is asked, over which documents), ``two_chunk`` (questions made here),
``arms`` (how), ``forcing`` (an answer's likelihood over blended KV), ``observe`` (asks the engine),
``metrics`` and ``score`` (an answer against the reference), ``bootstrap`` and ``summary`` (intervals),
``markdown`` and ``plot``.
"""
