"""How accurate solvers are at few network calls, on mixtures whose flow is known: `python -m experiments.solvers`."""
