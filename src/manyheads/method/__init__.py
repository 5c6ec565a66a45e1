"""What acts on a given model, at inference or in training."""
