"""What the system costs: a table of figures, each beside its baseline of the same run."""
