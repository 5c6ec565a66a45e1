"""Measures attention: providers on the same inputs, interleaved, no speed without fidelity."""
