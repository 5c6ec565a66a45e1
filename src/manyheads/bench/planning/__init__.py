"""From a model, a mask or a results file to predictions: what would be fast, how large, how well balanced."""
