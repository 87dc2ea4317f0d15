"""A training run: the stock Trainer with what watches over it."""
