"""The objective: how noise levels are drawn, and what the loss of an example is."""

import abc
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Float, PRNGKeyArray, PyTree, Scalar, Shaped

from gddim.sde import AbstractLinearSDE
from gddim.sde.linalg import Array

T_MIN = 1e-5  # the smallest time that is trained on, as published


class Row(NamedTuple):
    """An example and all that is random about it; of a batch, the same with an example a row."""

    x0: Array
    """Data in pixels, scaled, `(*dims, C)`."""
    level: Array
    """The noise level, a number: the time t, or what else an objective draws."""
    noise: Array
    """Normal noise, of as many fields as the objective perturbs."""
    key: Array
    """For dropout."""
    cond: PyTree = None
    """What conditions the network: a tree of arrays, or None."""


class AbstractObjective(eqx.Module):
    """What training minimises: the mean of `loss` over `rows`, both of which a new objective says.

    Called as `objective(model, x0, key, cond)` it is that mean, which `eqx.filter_value_and_grad` differentiates. The
    trainer draws the rows of a whole batch first, and then takes their losses in as many parts and on as many devices as
    there are: a row follows from the key and its number alone.

    >>> model = gddim.Denoiser(gddim.VP(), net=lambda x, level, cond=None, *, key=None: jnp.zeros_like(x))
    >>> objective = ScoreMatching(model.sde, power=2.0)
    >>> objective(model, jnp.zeros((5, 8, 8, 3)), jax.random.key(0)).shape
    ()
    """

    @abc.abstractmethod
    def rows(self, x0: Shaped[Array, "batch *dims C"], key: PRNGKeyArray, cond: PyTree = None) -> Row:
        """The examples of a batch with their noise levels, noises and keys, an example a row."""

    @abc.abstractmethod
    def loss(self, model: Any, row: Row) -> Scalar:
        """Of one example."""

    def mean_loss(self, model: Any, rows: Row) -> Scalar:
        """The mean of `loss` over rows."""
        return jnp.mean(jax.vmap(partial(self.loss, model))(rows))

    def __call__(
        self, model: Any, x0: Shaped[Array, "batch *dims C"], key: PRNGKeyArray, cond: PyTree = None
    ) -> Scalar:
        return self.mean_loss(model, self.rows(x0, key, cond))


class LogNormalNoise(AbstractObjective):
    """`model.loss_at(x0, σ, n)` at `ln σ ~ N(mean, std²)`, `n ~ N(0, I)`: a `Denoiser`'s, which needs no process.

    The target of its network has variance 1 at every σ, which are EDM's weights (Karras et al. 2022, arXiv 2206.00364).
    """

    mean: float = -1.2
    """Of ln σ."""
    std: float = 1.2
    """Of ln σ."""

    def rows(self, x0: Shaped[Array, "batch *dims C"], key: PRNGKeyArray, cond: PyTree = None) -> Row:
        """σ `(batch,)` and noise `(batch, *dims, C)`. Raises `ValueError` for data that are not floating."""
        x0 = _floating(x0)
        sigma_key, noise_key, net_key = jax.random.split(key, 3)
        sigma = jnp.exp(self.mean + self.std * jax.random.normal(sigma_key, x0.shape[:1], x0.dtype))
        noise = jax.random.normal(noise_key, x0.shape, x0.dtype)
        return Row(x0, sigma, noise, jax.random.split(net_key, len(x0)), cond)

    def loss(self, model: Any, row: Row) -> Float[Array, ""]:
        """That of the network at a noise level: see `Denoiser.loss_at`."""
        return model.loss_at(row.x0, row.level, row.noise, row.cond, key=row.key)


class ScoreMatching(AbstractObjective):
    """Denoising score matching: `model.loss(x0, t, ε)` at times t in [1e-5, T], uniform in `t^{1/power}`, `ε ~ N(0, I)`."""

    sde: AbstractLinearSDE
    """The process, which says the horizon T and the number k of fields of ε."""
    power: float = 1.0
    """1 as published, more for more of the small times."""

    def __check_init__(self) -> None:
        if not self.power > 0:
            raise ValueError(f"power={self.power} must be > 0")

    def rows(self, x0: Shaped[Array, "batch *dims C"], key: PRNGKeyArray, cond: PyTree = None) -> Row:
        """Times `(batch,)` and ε `(batch, *dims, k, C)`. Raises `ValueError` for data that are not floating."""
        x0 = _floating(x0)
        t_key, eps_key, net_key = jax.random.split(key, 3)
        low, high = T_MIN ** (1 / self.power), self.sde.horizon ** (1 / self.power)
        t = jax.random.uniform(t_key, x0.shape[:1], x0.dtype, low, high) ** self.power
        eps = jax.random.normal(eps_key, (*x0.shape[:-1], self.sde.k, x0.shape[-1]), x0.dtype)
        return Row(x0, t, eps, jax.random.split(net_key, len(x0)), cond)

    def loss(self, model: Any, row: Row) -> Float[Array, ""]:
        """That of the parameterisation: see `EpsModel.loss` and `Denoiser.loss`."""
        return model.loss(row.x0, row.level, row.noise, row.cond, key=row.key)


def drop_labels(rows: Row, share: float) -> Row:
    """The rows of a batch with a share of `cond["label"]` −1, no class, each by a draw from its row's key.

    A network then learns to do with a class and without, which classifier-free guidance needs (Ho, Salimans, arXiv
    2207.12598).
    """
    if not share:
        return rows
    draw = lambda key: jax.random.bernoulli(jax.random.fold_in(key, 0), jnp.float32(share))
    label = rows.cond["label"]
    return rows._replace(
        cond={**rows.cond, "label": jnp.where(jax.vmap(draw)(rows.key), jnp.full_like(label, -1), label)}
    )


def _floating(x0: Array) -> Array:
    x0 = jnp.asarray(x0)
    if not jnp.issubdtype(x0.dtype, jnp.floating):
        raise ValueError(f"x0 is {x0.dtype}: scale to [−1, 1] first, images by gddim.data.to_unit")
    return x0 if x0.dtype.itemsize > 2 else x0.astype(jnp.float32)  # levels, noises and coefficients are of its type


def denoising_loss(
    model: Any,
    x0: Shaped[Array, "batch *dims C"],
    key: PRNGKeyArray,
    power: float = 1.0,
    cond: PyTree = None,
) -> Scalar:
    """The batch's mean of `model.loss(x0, t, ε)`, `t ~ U[1e-5, T]`, `ε ~ N(0, I)`, as `ScoreMatching` draws them.

    `model`: an `EpsModel` or a `Denoiser`.
    `x0`: data in pixels, scaled, `(batch, *dims, C)`.
    `key`: all that is random: times, noise and dropout.
    `power`: times are uniform in `t^{1/power}`; 1 as published.
    `cond`: what conditions the network, a tree of arrays with an example a row.

    Returns a scalar. Raises `ValueError` for data that are not floating, as bytes of images are.
    """
    return ScoreMatching(model.sde, power)(model, x0, key, cond)
