"""Mechanisms: one system, one file. Each chooses which pairs, kernel and estimator, then calls an engine."""
