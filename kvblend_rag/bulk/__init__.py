"""Bulk ingest on Ray Data: documents by the million, on as many engines as there are.

Read in this order: ``feed`` (what a row says), ``agenda`` (which rows count), ``data_set`` (rows through Ray),
``worker`` (one engine), ``ledger`` (what is done, and what failed), ``run`` (all of it).
"""
