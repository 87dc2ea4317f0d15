"""Synthetic speech for demonstrations, and the small backbone that is shipped for it."""
