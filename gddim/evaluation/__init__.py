"""Evaluation: feature spaces, distances between sets of samples, and their sweep over samplers and network calls."""

from gddim.samplers.words import parse_sampler as parse_sampler
from gddim.samplers.words import sampler_name as sampler_name
from gddim.samplers.words import steps_for as steps_for
