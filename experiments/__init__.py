"""One small file an experiment: a docstring and a dataclass. `python -m experiments.NAME --help` tells its options."""
