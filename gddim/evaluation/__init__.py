"""Evaluation: feature spaces, distances between sets of samples, and their sweep over samplers and network calls."""

from gddim.evaluation.samplers import parse_sampler as parse_sampler
from gddim.evaluation.samplers import sampler_name as sampler_name
from gddim.evaluation.samplers import steps_for as steps_for
