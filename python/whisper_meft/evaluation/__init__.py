"""Classifying, scoring and drawing the results."""
