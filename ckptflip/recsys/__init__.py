"""Recommendation models, their data, and their embedding tables as targets of faults."""
