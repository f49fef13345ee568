"""
Reads, checks and describes what is saved with an adapter.

Built on `layers` and below. Imported by `model.py`, bundles and convert.
"""
