"""A training step's memory, counted on tensors that hold nothing."""
