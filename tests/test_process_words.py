"""Processes by their words: each says one process, which says the word, and what is wrong with a word takes a line."""

import dataclasses
import re

import numpy as np
import pytest

import gddim
from gddim.errors import UserError
from gddim.experiment import Sampling
from gddim.experiment.words import spell_process
from gddim.sde.words import parse_process, process_name

WORDS = re.split(
    " ",
    "vp vp:beta_max=10 cosine cosine:horizon=1 subvp:beta_min=0.2 ve ve:sigma_max=50 flow flow:horizon=0.99 cld "
    "cld:gamma=0.1 cld:m_inv=1:epsilon=1e-05 psld psld:gamma=0.3333333333333333 langevin langevin:order=4:beta=2 "
    "experiments.processes:third_order_langevin:beta=5 "
    "test_process_words:OURS",
)
FORMS = "vp, cosine, subvp, ve, flow, cld, psld, langevin, and module:object"
OURS = gddim.GaussianPath(lambda t: np.exp(-t), lambda t: np.sqrt(-np.expm1(-2 * t)), horizon=5.0)


@pytest.mark.parametrize("word", WORDS)
def test_a_process_and_its_word_are_each_others_inverse(word: str):
    sde = parse_process(word)
    assert process_name(sde) == word
    assert parse_process(process_name(sde)) == sde
    assert hash(parse_process(word)) == hash(sde), "one word, one solution and one compiled program"


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ("CLD", "cld"), ("cld:gamma=0.04", "cld"), ("cld:gamma=1e-1", "cld:gamma=0.1"), ("gddim:CLD", "cld"),
        ("langevin:order=3", "langevin"), ("experiments.processes:phase_space_langevin", "psld"),
        ("experiments.processes:third_order_langevin", "langevin"),
        ("cld:epsilon=1e-5:m_inv=1", "cld:m_inv=1:epsilon=1e-05"), (" vp ", "vp"),
    ],
)  # fmt: skip
def test_what_is_said_in_other_words_has_one_name(said: str, word: str):
    assert process_name(parse_process(said)) == word


@pytest.mark.parametrize(
    ("sde", "word"),
    [(gddim.CLD(), "cld"), (gddim.VE(50.0), "ve:sigma_max=50"), (gddim.VP.cosine(), "cosine"), (None, "own")],
)
def test_a_process_made_in_code_has_its_word(sde, word):
    assert spell_process(sde) == word


@pytest.mark.parametrize("sde", [gddim.Blurring(8), gddim.VP.from_betas([0.1, 0.2])])
def test_a_process_without_a_word_is_told_by_its_fields(sde):
    assert process_name(sde) == " ".join(repr(sde).split())


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("langevn", [FORMS]),
        ("", [FORMS]),
        ("no_such_module:sde", ["no_such_module", FORMS]),
        (":sde", [FORMS]),
        ("gddim:nothing", ["nothing", FORMS]),
        ("gddim:LinearSDE", ["cannot be called without arguments"]),
        ("gddim:__version__", ["is a str, not a gddim.AbstractLinearSDE"]),
        ("cld:gama=0.1", ["'gama=0.1'", "m_inv, beta0, beta1, gamma, epsilon, horizon"]),
        ("cld:gamma", ["'gamma' is no parameter set to a finite number"]),
        ("cld:gamma=some", ["'gamma=some' is no parameter set to a finite number"]),
        ("ve:sigma_max=inf", ["finite"]),
        ("cld:gamma=0.1:gamma=0.2", ["twice"]),
        ("cld:gamma=-1", ["gamma=-1.0 must be ≥ 0"]),
        ("langevin:order=2.5", ["'order=2.5' is no parameter set to a whole number"]),
        ("test_process_words:OURS:horizon=3", ["it has no parameters"]),
    ],
)
def test_a_wrong_word_is_one_line_that_says_what_is_accepted(word: str, says: list[str]):
    with pytest.raises(UserError) as found:
        parse_process(word)
    message = str(found.value)
    assert "\n" not in message
    assert not [each for each in says if each not in message], message


@pytest.mark.parametrize(
    ("sde", "t_min", "power"),
    [(gddim.CLD(), 1e-3, 2), (gddim.VP(), 1e-3, 2), (gddim.VE(), 0.002, 7), (OURS, 5e-3, 2), (gddim.PSLD(), 1e-3, 2)],
)
def test_a_grid_is_that_of_the_process_unless_it_is_told(sde, t_min: float, power: float):
    """EDM's for the path of EDM, and where times are 0 … N a thousandth of N."""
    method = Sampling().method(sde, (8, 8, 1))
    assert (method.t_min, method.power) == (t_min, power)
    told = dataclasses.replace(Sampling(), t_min=0.5, power=3.0).method(sde, (8, 8, 1))
    assert (told.t_min, told.power) == (0.5, 3.0)
    discrete = gddim.VP.from_betas(np.linspace(1e-4, 0.02, 1000))
    assert Sampling().method(discrete, (8, 8, 1)).t_min == 1.0


def test_a_process_made_in_code_has_its_word_too():
    assert process_name(gddim.PSLD()) == "psld"
    assert process_name(gddim.CriticallyDamped()) == "langevin"
    assert "\n" not in process_name(gddim.PSLD(beta=7.0))
