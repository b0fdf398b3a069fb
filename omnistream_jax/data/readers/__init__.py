"""Readers of the published data sets: one file a family; `registry.py` names them all.

Each turns the layout that a user has after unpacking into the shapes and axes of `data/schema.py`.
"""
