"""Batches: many requests in one file, answered when nobody else needs the engine."""
