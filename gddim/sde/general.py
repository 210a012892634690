"""Any linear SDE from its coefficients, solved once in float64."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, SupportsFloat

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gddim.sde.base import AbstractLinearSDE, Time
from gddim.sde.coefficients import Coefficient, Coefficients, checked
from gddim.sde.collocation import NODES
from gddim.sde.linalg import Array, as_times, inverse, namespace, product, transpose
from gddim.sde.solve import Polynomials, solve


class LinearSDE(AbstractLinearSDE):
    """`du = F(t) u dt + G(t) dw` for any F and GGᵀ, which need not commute, per position or for all (`(*#dims, k, k)`).

    Ψ, Σ and R are solved once, when first needed, in float64: the equations of Ψ and Σ by Gauss collocation on panels
    that are halved until F, GGᵀ, Ψ and R are polynomials to 1e-12, a square root of Σ carried from panel to panel, and
    `R = L O` by `O' = (L⁻¹F̂L − L⁻¹L') O`, `O_0 = I`, an equation of rotations that does not share the stiffness of
    `R' = F̂ R`. From then on they are polynomials, on host and device. For k = 1 a decay may be of any rate.

    The polynomials are compared with the coefficients between the nodes and at the ends of the panels, and at 16,384 times
    spread over the horizon T, so that what lasts for T/10,000 is surely seen (longer in proportion where F or GGᵀ has more
    than 16,384 elements). Jumps, pulses and kinks are found and resolved, a hundred or so; more of them, or shorter ones,
    need their times as `breakpoints`. A warning tells where rounding in the coefficients (single precision, a cancellation
    as in 1 − t near 1) leaves more than 1e-10.

    `drift`, `diffusion_squared`: F and GGᵀ, functions of a scalar time, in NumPy, JAX or plain Python.
    `initial_covariance`: Σ_0, the covariance of the state at t = 0 given the data.
    `horizon`: T, the time at which sampling starts.
    `basis`: the pair `(from_pixels, to_pixels)` where dims are not pixels, e.g. `(dct2, idct2)`.
    `breakpoints`: times in [0, horizon] at which `drift` or `diffusion_squared` may jump or kink; they are not evaluated
    there, but on either side. E.g. `np.arange(1, 1000) / 1000` for the steps of a thousand betas.

    Times outside [0, horizon] raise `ValueError`, and give NaN where they are JAX arrays, which may be traced.

    Raises `ValueError`, naming the argument, for coefficients that are not finite or not of one shape `(*#dims, k, k)`, a
    GGᵀ that is not positive semidefinite, an initial covariance that is not positive definite (for k = 1 it may be 0 where
    GGᵀ is not), a horizon ≤ 0, breakpoints outside it; and, naming the time, for coefficients that are singular (flow
    matching at its horizon) or that no number of panels that fits resolves, for k > 1 those of a rate ∫|F| dt above some
    10,000.

    >>> beta = lambda t: 0.1 + 19.9 * t  # the variance-preserving SDE, from its coefficients
    >>> vp = LinearSDE(lambda t: [[-beta(t) / 2]], lambda t: [[beta(t)]], initial_covariance=[[0.0]])
    >>> bool(np.allclose(vp.noise_factor(0.3), gddim.VP().noise_factor(0.3), rtol=1e-11))
    True
    """

    k: int = eqx.field(static=True)
    horizon: float = eqx.field(static=True)
    basis: tuple[Callable, Callable] | None = eqx.field(static=True)
    _solution: "Solution" = eqx.field(static=True)

    def __init__(
        self,
        drift: Coefficient,
        diffusion_squared: Coefficient,
        initial_covariance: Any,
        horizon: SupportsFloat = 1.0,
        basis: tuple[Callable, Callable] | None = None,
        breakpoints: Any = (),
    ):
        horizon = float(horizon)
        if not 0 < horizon < np.inf:
            raise ValueError(f"horizon={horizon} must be > 0")
        for name, value in (("drift", drift), ("diffusion_squared", diffusion_squared)):
            if not callable(value):
                raise ValueError(f"{name} must be a function of time, given a {type(value).__name__}")
        if callable(initial_covariance):
            raise ValueError("initial_covariance must be a matrix, that at t = 0, given a function")
        breaks = np.unique(np.asarray(breakpoints, np.float64).reshape(-1))
        if not np.all((breaks >= 0) & (breaks <= horizon)):
            raise ValueError(f"breakpoints must be times in [0, {horizon}]: {breaks.min()} to {breaks.max()} given")
        inside = breaks[(breaks > 0) & (breaks < horizon)]
        edges = np.array([0.0, *inside, horizon])
        longest = np.argmax(np.diff(edges))
        with jax.enable_x64(True):
            middle = (edges[longest] + edges[longest + 1]) / 2  # which is no breakpoint
            F = checked("drift", np.asarray(drift(middle), np.float64))
            GG = checked("diffusion_squared", np.asarray(diffusion_squared(middle), np.float64))
        self.k = F.shape[-1]
        covariance = checked("initial_covariance", np.asarray(initial_covariance, np.float64))
        for name, value in (("diffusion_squared", GG), ("initial_covariance", covariance)):
            if value.shape[-1] != self.k:
                raise ValueError(f"{name} has shape {value.shape}, drift {F.shape}: the last two axes must agree")
            smallest = np.linalg.eigvalsh(value).min() if np.allclose(value, transpose(value)) else -np.inf
            strict = name == "initial_covariance" and self.k > 1
            if smallest < -1e-12 * np.abs(value).max() or (strict and smallest <= 0):
                raise ValueError(f"{name} must be symmetric and positive {'' if strict else 'semi'}definite")
        self.horizon, self.basis = horizon, basis
        whole = np.broadcast_to(covariance, np.broadcast_shapes(F.shape, GG.shape, covariance.shape))
        self._solution = Solution(Coefficients(drift, diffusion_squared, whole, self.horizon), inside)

    def transition(self, t: Time, s: Time) -> Array:
        xp, t, s = as_times(t, s)
        t, s = xp.broadcast_arrays(t, s)
        return _transition(self._solution, t, s) if xp is jnp else self._solution.transition(t, s)

    def noise_factor(self, t: Time) -> Array:
        xp, t = as_times(t)
        return _noise_factor(self._solution, t) if xp is jnp else self._solution.noise_factor(t)

    def to_pixels(self, u: Array) -> Array:
        return u if self.basis is None else self.basis[1](u)

    def from_pixels(self, x: Array) -> Array:
        return jnp.asarray(x) if self.basis is None else self.basis[0](x)


class Solution:
    """The process as polynomials in y = √t on panels of [0, √T], on host and device; solved when first needed."""

    def __init__(self, coefficients: Coefficients, breakpoints: np.ndarray):
        self.coefficients, self.breakpoints = coefficients, breakpoints

    def __repr__(self) -> str:
        """What tells one process from another in the description of a run: the sizes of its coefficients."""
        return f"{self.coefficients.shape}: " + ", ".join(f"{k} {v:.8g}" for k, v in self.coefficients.sizes())

    @cached_property
    def polynomials(self) -> Polynomials:
        return solve(self.coefficients, self.breakpoints)

    def noise_factor(self, t: Array) -> Array:
        return self._everywhere(self._at(self.polynomials.R, t))

    def drift(self, t: Array) -> Array:
        return self._everywhere(self._at(self.polynomials.F, t))

    def diffusion_squared(self, t: Array) -> Array:
        return self._everywhere(self._at(self.polynomials.GG, t))

    def _locate(self, t: Array) -> tuple[Array, Array]:
        """The panel of each time and `P_n(ξ)`, `(*t.shape, NODES)`."""
        xp, horizon = namespace(t), self.coefficients.horizon
        if xp is np and not np.all((t >= 0) & (t <= horizon * (1 + 1e-9))):
            raise ValueError(f"t={np.min(t)} … {np.max(t)} must lie in [0, {horizon}], where this LinearSDE is solved")
        edges = xp.asarray(self.polynomials.edges, t.dtype)
        y = xp.sqrt(t)
        panel = xp.clip(xp.searchsorted(edges, y, side="right") - 1, 0, len(edges) - 2)
        lower, upper = edges[panel], edges[panel + 1]
        width = xp.where(upper > lower, upper - lower, 1)  # edges may agree in single precision
        xi = xp.where(upper > lower, (2 * y - lower - upper) / width, 1)
        xi = xp.where(t <= horizon * (1 + 1e-6), xi, xp.nan)  # a traced time cannot raise
        basis = [xp.ones_like(xi), xi]
        for n in range(1, NODES - 1):
            basis.append(((2 * n + 1) * xi * basis[n] - n * basis[n - 1]) / (n + 1))
        return panel, xp.stack(basis, -1)

    def _at(self, polynomial: np.ndarray, t: Array) -> Array:
        """A polynomial at the times, for every kind of position: `(*t.shape, kinds, k, k)`."""
        xp = namespace(t)
        panel, basis = self._locate(t)
        return (xp.asarray(polynomial, t.dtype)[panel] * basis[..., None, None, None]).sum(t.ndim)

    def _everywhere(self, values: Array) -> Array:
        """`(…, kinds, k, k)` to `(…, *#dims, k, k)`."""
        return values[..., self.coefficients.kinds[1], :, :]

    def transition(self, t: Array, s: Array) -> Array:
        """`Ψ(t, s)`, `(*t.shape, *#dims, k, k)`."""
        with np.errstate(over="ignore", invalid="ignore"):  # back over what has decayed for long is infinite
            return self._everywhere((self._scalar if self.coefficients.shape[-1] == 1 else self._coupled)(t, s))

    def _scalar(self, t: Array, s: Array) -> Array:
        """k = 1: of `log Ψ(t, 0) − log Ψ(s, 0)`, the parts up to the panels are subtracted in two halves of precision."""
        xp, logs = namespace(t), self.polynomials.ahead
        coarse = logs.astype(t.dtype)
        fine = (logs - coarse).astype(t.dtype)
        late, early = self._locate(t)[0], self._locate(s)[0]
        parts = [table[late] - table[early] for table in map(xp.asarray, (coarse, fine))]
        log = parts[0] + (parts[1] + (self._at(self.polynomials.psi, t) - self._at(self.polynomials.psi, s)))
        return xp.exp(log)

    def _coupled(self, t: Array, s: Array) -> Array:
        """k > 1: the product over the panels between s and t, by powers of 2: of Ψ forward in time, of inverses backward."""
        xp, solved = namespace(t), self.polynomials
        late, early = xp.maximum(t, s), xp.minimum(t, s)
        at, last = self._locate(early)[0], self._locate(late)[0]
        psi_late, psi_early = self._at(solved.psi, late), self._at(solved.psi, early)
        column = lambda flags: flags.reshape(t.shape + (1,) * 3)
        # forward in time the transpose is built, so that both directions multiply from the right
        forward = column(t >= s)
        choose = lambda ahead, behind: xp.where(forward, transpose(ahead), behind)
        M, count = choose(inverse(psi_early), psi_early), last - at
        for j, tables in enumerate(zip(solved.ahead, solved.back, strict=True)):
            active = (count >> j) & 1 > 0
            ahead, behind = (xp.asarray(table, t.dtype)[at] for table in tables)
            M = xp.where(column(active), product(M, choose(ahead, behind)), M)
            at = xp.where(active, at + 2**j, at)
        M = product(M, choose(psi_late, inverse(psi_late)))
        return xp.where(forward, transpose(M), M)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _transition(solution: Solution, t: Array, s: Array) -> Array:
    return solution.transition(t, s)


@_transition.defjvp
def _(solution: Solution, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """`∂_t Ψ = F_t Ψ`, `∂_s Ψ = −Ψ F_s`."""
    t, s = primals
    psi = solution.transition(t, s)
    F_t, F_s = solution.drift(t), solution.drift(s)
    expand = lambda dt: dt.reshape(dt.shape + (1,) * (psi.ndim - dt.ndim))
    return psi, product(F_t, psi) * expand(tangents[0]) - product(psi, F_s) * expand(tangents[1])


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _noise_factor(solution: Solution, t: Array) -> Array:
    return solution.noise_factor(t)


@_noise_factor.defjvp
def _(solution: Solution, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """`R' = F R + ½ GGᵀ R⁻ᵀ`."""
    (t,), (dt,) = primals, tangents
    R = solution.noise_factor(t)
    rate = product(solution.drift(t), R) + product(solution.diffusion_squared(t), transpose(inverse(R))) / 2
    return R, rate * dt.reshape(dt.shape + (1,) * (R.ndim - dt.ndim))
