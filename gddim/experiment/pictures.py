"""Pictures of samples and of the way to them; each function returns an image `(H, W, 3)` in uint8."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped, UInt8

from gddim.data import to_uint8
from gddim.experiment.drawing import Paths
from gddim.sde import AbstractLinearSDE
from gddim.sde.linalg import inverse, product, transpose

Picture = UInt8[np.ndarray, "height width 3"]


def gallery(samples: Shaped[np.ndarray, "n ..."]) -> Picture:
    """Images `(n, H, W, C)` in a grid, or points `(n, C)` as a scatter of their first two coordinates."""
    if samples.ndim == 2:
        figure, axes = _figure(1, 1, size=(5, 5))
        _scatter(axes[0], samples)
        return _render(figure)
    return _tile(samples, columns=math.ceil(math.sqrt(len(samples))))


def rows(samples: Shaped[np.ndarray, "n m ..."]) -> Picture:
    """Images `(n, m, H, W, C)` in n rows of m, or points `(n, m, C)` joined to n lines."""
    if samples.ndim == 3:
        figure, axes = _figure(1, 1, size=(5, 5))
        for points in samples:
            axes[0].plot(points[:, 0], points[:, min(1, points.shape[1] - 1)], marker=".")
        axes[0].set_aspect("equal")
        return _render(figure)
    return _tile(samples.reshape(-1, *samples.shape[2:]), columns=samples.shape[1])


def film(paths: Paths, frames: int = 9, shown: int = 4) -> Picture:
    """From noise to data in a strip of frames: for each sample what it is, and below it the data foreseen there.

    All points of a set share one frame.
    """
    chosen = np.linspace(0, len(paths.ts) - 1, frames).round().astype(int)
    strips = np.stack([np.asarray(part[chosen]) for part in (paths.data, paths.foreseen)])  # (2, frames, n, *data)
    if strips.ndim == 4:
        figure, axes = _figure(2, frames, size=(2 * frames, 4))
        for ax, points in zip(axes, strips.reshape(-1, *strips.shape[2:]), strict=True):
            _scatter(ax, points)
            ax.set(xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[])
        return _render(figure)
    rows = np.moveaxis(strips[:, :, :shown], 2, 0)  # (n, 2, frames, H, W, C)
    return _tile(rows.reshape(-1, *rows.shape[3:]), columns=frames)


def trajectory(sde: AbstractLinearSDE, paths: Paths, lines: int = 6) -> Picture:
    """For a few random pixels: x(t), and along the same path ε in L and in R coordinates, `L⁻ᵀε_L = R⁻ᵀε_R`.

    In R coordinates ε hardly moves, and few steps follow it; a field of the state has its own kind of line.
    """
    ts = paths.ts
    to_L = transpose(product(inverse(sde.noise_factor(ts)), sde.cholesky_factor(ts)))  # Lᵀ R⁻ᵀ
    to_L = jnp.asarray(to_L, paths.eps.dtype)
    eps_L = jax.vmap(lambda A, eps: jax.vmap(lambda e: product(A, e))(eps))(to_L, paths.eps)
    figure, axes = _figure(1, 3, size=(13, 4))
    numbers = np.asarray(paths.data).reshape(len(ts), -1)
    chosen = np.random.default_rng(0).permutation(numbers.shape[1])[:lines]
    axes[0].plot(ts, numbers[:, chosen])
    for ax, eps in ((axes[1], eps_L), (axes[2], paths.eps)):
        for field in range(sde.k):
            values = jax.vmap(jax.vmap(sde.to_pixels))(eps[..., field, :])
            ax.set_prop_cycle(None)
            ax.plot(ts, np.asarray(values).reshape(len(ts), -1)[:, chosen], linestyle=("-", "--", ":")[field % 3])
    for ax, title in zip(axes, ("x(t)", "ε in L coordinates", "ε in R coordinates"), strict=True):
        ax.set(title=title, xlabel="t")
        ax.invert_xaxis()
    axes[2].sharey(axes[1])
    return _render(figure)


def _scatter(ax: Any, points: Shaped[np.ndarray, "n c"]) -> None:
    ax.scatter(points[:, 0], points[:, min(1, points.shape[1] - 1)], s=1, linewidths=0)
    ax.set_aspect("equal")


def _tile(images: Shaped[np.ndarray, "n h w c"], columns: int, least: int = 32) -> Picture:
    """Images row by row with a pixel between them, enlarged by a whole number to at least `least` pixels."""
    pixels = images if images.dtype == np.uint8 else np.asarray(to_uint8(jnp.asarray(images)))
    pixels = pixels if pixels.shape[-1] == 3 else np.repeat(pixels[..., :1], 3, axis=-1)
    scale = max(1, least // pixels.shape[1])
    pixels = pixels.repeat(scale, 1).repeat(scale, 2)
    n, height, width, _ = pixels.shape
    rows = -(-n // columns)
    tiled = np.zeros((rows * columns, height + 1, width + 1, 3), np.uint8)
    tiled[:n, :height, :width] = pixels
    tiled = tiled.reshape(rows, columns, height + 1, width + 1, 3).swapaxes(1, 2)
    return tiled.reshape(rows * (height + 1), columns * (width + 1), 3)


def _figure(rows: int, columns: int, size: tuple[int, int]) -> tuple[Any, list[Any]]:
    """A figure that needs no display and no global state, and its axes in reading order."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _render(figure: Any) -> Picture:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
