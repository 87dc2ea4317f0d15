"""A page on which a trained model can be tried: what it hears, how that is drawn, and serving it."""
