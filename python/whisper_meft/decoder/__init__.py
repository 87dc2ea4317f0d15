"""The frozen decoder: Hugging Face's own code around modules that read, correct or recompute."""
