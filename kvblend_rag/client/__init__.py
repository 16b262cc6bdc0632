"""A running server in place of an engine of one's own, over OpenAI's client library.

Reading order: connection, tokenizer, turn, reading, documents, engine. Neither vLLM nor torch is needed for it.
"""
