"""Gaussian mixtures with their exact denoiser: of five kinds, and as many of each as there are seeds."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, ScalarLike

DATA_STD = 0.5


class Mixture(eqx.Module):
    """`Σ_i w_i N(μ_i, v_i I + U_i diag(s_i) U_iᵀ)` in d dimensions, as its denoiser `E[x₀ | x₀ + σn = y]`."""

    log_weights: Float[Array, " m"]
    centres: Float[Array, "m d"]
    variances: Float[Array, " m"]
    bases: Float[Array, "m d r"]
    """Orthonormal columns U_i."""
    spreads: Float[Array, "m r"]

    def __call__(self, y: Float[Array, " d"], sigma: ScalarLike) -> Float[Array, " d"]:
        """`y − σ² Σ_i p(i | y) (C_i + σ²)⁻¹ (y − μ_i)`."""
        noise, gaps = self.variances + sigma**2, y[None] - self.centres
        along = jnp.einsum("mdr,md->mr", self.bases, gaps)
        shrunk = self.spreads / (self.spreads + noise[:, None])
        pulls = (gaps - jnp.einsum("mdr,mr->md", self.bases, shrunk * along)) / noise[:, None]
        log_det = len(y) * jnp.log(noise) + jnp.log1p(self.spreads / noise[:, None]).sum(-1)
        share = jax.nn.softmax(self.log_weights - ((gaps * pulls).sum(-1) + log_det) / 2)
        return y - sigma**2 * jnp.einsum("m,md->d", share, pulls)


def _few(rng: np.random.Generator) -> Mixture:
    """Up to eight narrow or wide modes in the plane."""
    return _made(rng, rng.normal(size=(8, 2)), present=int(rng.integers(2, 9)), width=np.exp(rng.uniform(-4, -1)))


def _many(rng: np.random.Generator) -> Mixture:
    """Up to 64 modes in 8 dimensions."""
    return _made(rng, rng.normal(size=(64, 8)), present=int(rng.integers(20, 65)), width=np.exp(rng.uniform(-4, -1)))


def _anisotropic(rng: np.random.Generator) -> Mixture:
    """Ellipsoids in 16 dimensions, long in four of them."""
    spreads = np.exp(rng.uniform(-5, 0, (8, 4)))
    return _made(rng, rng.normal(size=(8, 16)), int(rng.integers(2, 9)), np.exp(rng.uniform(-4, -2)), spreads)


def _manifold(rng: np.random.Generator) -> Mixture:
    """Points along a closed curve in 64 dimensions, spread along it."""
    angle = 2 * np.pi * np.arange(64)[:, None] / 64
    turns = np.arange(1, rng.integers(3, 7))
    wave, slope = (np.concatenate(x, -1) for x in (
        (np.cos(turns * angle), np.sin(turns * angle)), (-turns * np.sin(turns * angle), turns * np.cos(turns * angle))
    ))  # fmt: skip
    amplitudes = rng.normal(size=(wave.shape[1], 64)) / np.tile(turns, 2)[:, None]
    tangent = slope @ amplitudes
    step = np.linalg.norm(tangent, axis=-1, keepdims=True) * 2 * np.pi / 64
    return _made(rng, wave @ amplitudes, 64, np.exp(rng.uniform(-4, -2)), step**2 / 4, tangent[:, :, None])


def _digits(rng: np.random.Generator) -> Mixture:
    """Real digits of 8 × 8 pixels as modes, 128 of them."""
    images = _images()
    return _made(rng, images[rng.choice(len(images), 128, replace=False)], 128, np.exp(rng.uniform(-3, -1.5)))


@cache
def _images() -> np.ndarray:
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)[0] / 8 - 1


KINDS: dict[str, Callable[[np.random.Generator], Mixture]] = {
    "few": _few, "many": _many, "anisotropic": _anisotropic, "manifold": _manifold, "digits": _digits,
}  # fmt: skip


def mixture(kind: str, seed: int) -> Mixture:
    """The mixture of a kind and a seed, of mean 0 and mean variance `DATA_STD²` over its dimensions."""
    return KINDS[kind](np.random.default_rng([*kind.encode(), seed]))


def _made(
    rng: np.random.Generator, centres: np.ndarray, present: int, width: float, spreads: np.ndarray | None = None,
    directions: np.ndarray | None = None,
) -> Mixture:  # fmt: skip
    """Of the first `present` centres, with weights and widths at random about their own; scaled. Those of a kind are alike
    in shape, so that they share a program: what is not present has no weight.
    """
    m, d = centres.shape
    spreads = np.zeros((m, 1)) if spreads is None else spreads
    bases, _ = np.linalg.qr(rng.normal(size=(m, d, spreads.shape[1])) if directions is None else directions)
    logits = np.where(np.arange(m) < present, rng.normal(size=m) / 2, -np.inf)
    weights = np.exp(logits) / np.exp(logits).sum()
    variances = (width * np.exp(rng.normal(size=m) / 4)) ** 2
    centres = centres - weights @ centres
    mean_square = weights @ ((centres**2).sum(-1) + spreads.sum(-1) + d * variances) / d
    scale = DATA_STD / np.sqrt(mean_square)
    return Mixture(logits, scale * centres, scale**2 * variances, bases, scale**2 * spreads)  # pyright: ignore[reportArgumentType]
