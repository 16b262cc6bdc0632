"""The demo's parts: a small reader, an invented company's documents, and questions about them.

Reading order: ``library`` (documents), ``questions``, ``retriever`` (which documents a question
needs), ``prompt`` (how they meet in a prompt), ``reader`` (the model), ``score`` (was it right?).
Importing this package loads none of the heavy libraries.
"""
