"""Every method on one dataset with one budget, and the report of it."""
