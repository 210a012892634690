"""Evaluation: feature spaces, distances between sets of samples, and their sweep over samplers and network calls."""
