"""python -m experiments.solvers.images [--model FILE] [--size 16]: which samplers are nearest a network's own flow, on images.

Mixtures have at most 64 dimensions, images thousands, which few directions rule: noise of another scale decides what they are.
Without a `--model`, which `gddim.load` reads, the network is the exact denoiser of images of CIFAR-10, each with a little noise
around it, at a size and in colours of your choice. A number is the distance of a sample to the end of a run of 128 calls of
`gddim:3:data` from the same noise, root mean square over pixels: median and root mean square over noises.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, ScalarLike

import gddim
from experiments.solvers.__main__ import PROCESSES, check
from gddim.data import CIFAR10
from gddim.errors import UserError, exit_status, printable
from gddim.experiment import Sampling
from gddim.model import seen_through
from gddim.samplers import AbstractSampler
from gddim.samplers.solver import AbstractSolver
from gddim.samplers.words import parse_sampler, sampler_name

SCALES = (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12)
SAMPLERS = ("gddim:3:data", *(f"gddim:3:data:free:data_std={std:g}@tuned" for std in SCALES))
TRUTH, TRUTH_CALLS = "gddim:3:data", 128
WIDTH = 0.3  # of the noise around an image, in units of the data's root mean square


def exact(images: Float[np.ndarray, "n h w c"]) -> Callable[[Array, ScalarLike], Array]:
    """The denoiser `E[x₀ | x₀ + σn = y]` of these images, each with normal noise around it."""
    flat = jnp.asarray(images.reshape(len(images), -1))
    squares, floor = (flat**2).sum(1), float((WIDTH**2 * flat**2).mean())

    def denoise(y: Array, sigma: ScalarLike) -> Array:
        v, total = y.reshape(-1), sigma**2 + floor
        mean = jax.nn.softmax((flat @ v - squares / 2) / total) @ flat
        return (mean + floor / total * (v - mean)).reshape(y.shape)

    return denoise


def resized(images: Float[np.ndarray, "n 32 32 3"], size: int, channels: int) -> Float[np.ndarray, "n s s c"]:
    """Means of pixels, or each repeated; in grey for one channel."""
    n, side = len(images), images.shape[1]
    if size > side:
        images = images.repeat(size // side, 1).repeat(size // side, 2)
    else:
        images = images.reshape(n, size, side // size, size, side // size, 3).mean((2, 4))
    return images if channels == 3 else images.mean(-1, keepdims=True)


@eqx.filter_jit
def drawn(model: Any, solver: AbstractSolver, begin: Array) -> Array:
    """The samples from these states, some at a time."""
    # a traced solver wants a key; these add no noise
    one = lambda u: model.sde.project(solver(model, u, jax.random.key(0)).state)
    return jax.lax.map(one, begin, batch_size=64)


def drawn_by(model: Any, begin: Array, shape: tuple[int, ...], sampler: AbstractSampler, nfe: int) -> np.ndarray:
    """The same by a sampler in the scale of data of this shape, on the times that a run has."""
    method = Sampling(sampler=sampler, nfe=nfe).method(model.sde, shape)
    return np.asarray(drawn(model, method.solver(model.sde), begin))


def run(options: argparse.Namespace) -> None:
    """Measure and print, in Markdown."""
    if min(options.images, options.noises, *options.nfe) < 1:
        raise UserError("--images, --noises and --nfe must be at least 1")
    samplers = [parse_sampler(word) for word in options.samplers]
    check(options.processes, samplers)
    seen: Callable[[gddim.AbstractLinearSDE], Any]
    if options.model:
        loaded = gddim.load(options.model)
        seen, shape = partial(seen_through, loaded.model), loaded.shape
        if len(shape) != 3:
            raise UserError(f"--model {options.model}: its data are {shape}, no images")
    else:
        records = CIFAR10(options.root).train()[np.arange(options.images)]
        data = resized(np.asarray(records, np.float32) / 127.5 - 1, options.size, options.channels)
        seen, shape = partial(gddim.through, denoise=exact(data)), data.shape[1:]
    print(
        f"{options.model or 'exact denoiser'}, {shape}, data_scale {gddim.data_scale(shape):g}, {options.noises} noises\n"
    )
    for name in options.processes:
        sde = PROCESSES[name]
        keys = jax.random.split(jax.random.key(options.seed), options.noises)
        begin = jax.vmap(lambda key, sde=sde: sde.sample_prior(key, (*shape[:-1], sde.k, shape[-1])))(keys)
        ends = partial(drawn_by, seen(sde), begin, shape)
        truth = ends(parse_sampler(TRUTH), TRUTH_CALLS)
        print(f"| {name} | {' | '.join(f'{n} calls' for n in options.nfe)} |\n|---|{'---|' * len(options.nfe)}")
        for sampler in samplers:
            off = [np.sqrt(np.mean((ends(sampler, n) - truth) ** 2, (1, 2, 3))) for n in options.nfe]
            told = (f"{np.median(x):.4f} {np.sqrt(np.mean(x**2)):.4f}" for x in off)
            print(f"| `{sampler_name(sampler)}` | {' | '.join(told)} |", flush=True)
        print()


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. Ends with status 2 for what cannot be."""
    printable()
    parser = argparse.ArgumentParser("python -m experiments.solvers.images", description=__doc__)
    many: dict[str, Any] = dict(nargs="+", metavar="NAME")
    parser.add_argument(
        "--model", help="a run or a file, of images; without it the exact denoiser of images of CIFAR-10"
    )
    parser.add_argument("--root", help="folder of CIFAR-10, as --data.root of the experiments")
    parser.add_argument("--size", type=int, choices=(4, 8, 16, 32, 64), default=32, help="of these, in pixels (32)")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help="1: in grey (3)")
    parser.add_argument("--images", type=int, default=2000, help="how many of them, the first (2000)")
    parser.add_argument("--samplers", default=SAMPLERS, help="as --sampler names them", **many)
    parser.add_argument("--processes", default=("vp",), help=f"of {', '.join(PROCESSES)} (vp)", **many)
    parser.add_argument("--nfe", type=int, nargs="+", default=(5, 8), help="network calls a sample (5 8)")
    parser.add_argument("--noises", type=int, default=128, help="from which samples begin (128)")
    parser.add_argument("--seed", type=int, default=100, help="of the noises (100)")
    options = parser.parse_args(argv)
    if status := exit_status(
        lambda: run(options), "give fewer --images or --noises", "each line that is printed is whole"
    ):
        sys.exit(status)


if __name__ == "__main__":
    main()
