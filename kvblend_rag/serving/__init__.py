"""HTTP routes beside vLLM's own: ingest, delete, prefetch, statistics, reports; and learning what was seen.

Reading order: schemas, jobs, service, routes, plugin; seen, learner. Nothing here imports vLLM; FastAPI and Pydantic
come with it.
"""
