"""Pictures of samples and of the way to them; each function returns a figure, `title` above it in one or two lines."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped, UInt8

from gddim.data import to_uint8
from gddim.errors import from_extra
from gddim.evaluation.figures import LEGEND, LINES, PALETTE, new_figure
from gddim.experiment.drawing import Paths
from gddim.sde import AbstractLinearSDE
from gddim.sde.linalg import inverse, product, transpose

Picture = UInt8[np.ndarray, "height width 3"]

DPI = 100  # of sheets of images, in which a pixel of an image is a whole number of pixels
WIDTH = 640  # of the images on a sheet, which they are enlarged to where they are narrower
GAP = 2  # between images
PIXELS = 2**26  # of a sheet, at most: programs refuse larger pictures
FRAMES = 9  # of a film
FIELDS = ("position", "velocity", "acceleration")


def gallery(samples: Shaped[np.ndarray, "n ..."], title: str = "") -> Any:
    """Images `(n, H, W, C)` in a grid, as many as fit a sheet; others as points, a scatter of their first two numbers."""
    if samples.ndim != 4:
        figure, axes = new_figure(1, 1, (4.5, 4.5), title)
        _scatter(axes[0], samples.reshape(len(samples), -1))
        return figure
    shown = samples[: _fitting(samples.shape[1:3])]
    return _sheet(shown, math.ceil(math.sqrt(len(shown))), title)


def rows(samples: Shaped[np.ndarray, "n m ..."], title: str = "", left: Sequence[str] = ()) -> Any:
    """Images `(n, m, H, W, C)` in rows of m, each named on the `left`, as many as fit a sheet, also of a single row; others as
    points joined to n lines."""
    if samples.ndim != 5:
        figure, axes = new_figure(1, 1, (4.5, 4.5), title)
        for points in samples.reshape(*samples.shape[:2], -1):
            axes[0].plot(points[:, 0], points[:, min(1, points.shape[1] - 1)], marker=".")
        axes[0].set_aspect("equal")
        return figure
    most = _fitting(samples.shape[2:4])
    shown = samples[: max(1, most // samples.shape[1]), :most]
    return _sheet(shown.reshape(-1, *shown.shape[2:]), shown.shape[1], title, left=left[: len(shown)])


def film(paths: Paths, title: str = "", shown: int = 4) -> Any:
    """From noise to data in a strip of frames, each with its time: for each sample what it is, and below it the data
    foreseen there, of as many as fit a sheet. All points of a set, which is what are no images, share one frame.
    """
    chosen = np.linspace(0, len(paths.ts) - 1, FRAMES).round().astype(int)
    strips = np.stack([np.asarray(part[chosen]) for part in (paths.data, paths.foreseen)])  # (2, frames, n, *data)
    above, left = [f"t = {t:.2g}" for t in paths.ts[chosen]], ("state", "prediction")
    if strips.ndim != 6:
        figure, axes = new_figure(2, FRAMES, (1.3 * FRAMES, 3.2), title)
        for ax, points in zip(axes, strips.reshape(2 * FRAMES, strips.shape[2], -1), strict=True):
            _scatter(ax, points)
            ax.set(xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[])
        for ax, words in zip(axes, above, strict=False):
            ax.set_title(words, fontsize=9)
        for ax, words in zip(axes[::FRAMES], left, strict=True):
            ax.set_ylabel(words)
        return figure
    shown = min(shown, max(1, _fitting(strips.shape[3:5]) // (2 * FRAMES)))
    images = np.moveaxis(strips[:, :, :shown], 2, 0)  # (n, 2, frames, H, W, C)
    return _sheet(images.reshape(-1, *images.shape[3:]), FRAMES, title, above, left * len(images))


def trajectory(sde: AbstractLinearSDE, paths: Paths, title: str = "", lines: int = 6) -> Any:
    """For a few random pixels: x(t), and along the same path ε in L and in R coordinates, `L⁻ᵀε_L = R⁻ᵀε_R`.

    In R coordinates ε hardly moves, and few steps follow it; a field of the state has its own kind of line.
    """
    from matplotlib.lines import Line2D

    ts = paths.ts
    to_L = transpose(product(inverse(sde.noise_factor(ts)), sde.cholesky_factor(ts)))  # Lᵀ R⁻ᵀ
    to_L = jnp.asarray(to_L, paths.eps.dtype)
    eps_L = jax.vmap(lambda A, eps: jax.vmap(lambda e: product(A, e))(eps))(to_L, paths.eps)
    figure, axes = new_figure(1, 3, (11.0, 3.2), title)
    numbers = np.asarray(paths.data).reshape(len(ts), -1)
    chosen = np.random.default_rng(0).permutation(numbers.shape[1])[:lines].tolist()
    for ax in axes:
        ax.set_prop_cycle(color=PALETTE)
    drawn = axes[0].plot(ts, numbers[:, chosen], linewidth=1.2)
    for ax, eps in ((axes[1], eps_L), (axes[2], paths.eps)):
        for field in range(sde.k):
            values = jax.vmap(jax.vmap(sde.to_pixels))(eps[..., field, :])
            ax.set_prop_cycle(color=PALETTE)
            ax.plot(ts, np.asarray(values).reshape(len(ts), -1)[:, chosen], LINES[field % len(LINES)], linewidth=1.2)
    grown = np.max(sde.prior_covariance(sde.horizon)[..., 0, 0]) > 2
    for ax, words in zip(
        axes,
        ("x(t), scaled to variance 1" if grown else "x(t)", "ε in L coordinates", "ε in R coordinates"),
        strict=True,
    ):
        ax.set_title(words, fontsize=9)
        ax.set_xlabel("t")
        if sde.grid_power > 2:  # what happens does so at small times
            ax.set_xscale("log")
        ax.invert_xaxis()
    axes[2].sharey(axes[1])
    names = [_place(number, paths.data.shape[1:]) for number in chosen]
    kinds = [*FIELDS, *(f"field {i + 1}" for i in range(len(FIELDS), sde.k))][: sde.k] if sde.k > 1 else []
    drawn += [
        Line2D([], [], color="black", linestyle=line) for line, _ in zip(itertools.cycle(LINES), kinds, strict=False)
    ]
    figure.legend(drawn, names + kinds, **LEGEND)
    return figure


def pixels(figure: Any) -> Picture:
    """A figure as an image."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def _place(number: int, shape: tuple[int, ...]) -> str:
    """Which of the numbers of samples `(n, *dims, C)` this is."""
    sample, *position, channel = (int(i) for i in np.unravel_index(number, shape))
    if not position:
        return f"sample {sample}, coordinate {channel + 1}"
    colour = f", channel {channel + 1}" if shape[-1] > 1 else ""
    return f"sample {sample}, pixel ({', '.join(map(str, position))}){colour}"


def _scatter(ax: Any, points: Shaped[np.ndarray, "n c"]) -> None:
    ax.scatter(
        points[:, 0], points[:, min(1, points.shape[1] - 1)], s=1, linewidths=0, color=PALETTE[0], rasterized=True
    )
    ax.set_aspect("equal")


def _fitting(sides: tuple[int, int]) -> int:
    """How many images of these sides fit a sheet."""
    height, width = sides
    return max(1, PIXELS // ((height + GAP) * (width + GAP)))


def _sheet(
    images: Shaped[np.ndarray, "n h w c"], columns: int, title: str, above: Sequence[str] = (), left: Sequence[str] = ()
) -> Any:
    """Images row by row, enlarged by a whole number, not smoothed, with words `above` the columns and `left` of the rows."""
    with from_extra("eval"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    tiled, height, width = _tile(images, columns)
    x0, y0 = 8 + 72 * bool(left), 8 + 20 * (title.count("\n") + 1) * bool(title) + 18 * bool(above)
    across, down = x0 + tiled.shape[1] + 8, y0 + tiled.shape[0] + 8
    figure: Any = Figure(
        figsize=((across + 0.5) / DPI, (down + 0.5) / DPI), dpi=DPI
    )  # half a pixel, against rounding down
    FigureCanvasAgg(figure)
    figure.figimage(tiled, x0, 8, origin="upper", resize=False)

    def write(x: int, y: int, words: str, size: int, **align: Any) -> None:
        figure.text(x / across, 1 - y / down, words, fontsize=size, **align)

    write(8, 8, title, 10, va="top")
    for i, words in enumerate(above):
        write(x0 + i * width + (width - GAP) // 2, y0 - 4, words, 8, ha="center")
    for i, words in enumerate(left):
        write(x0 - 6, y0 + i * height + (height - GAP) // 2, words, 8, ha="right", va="center")
    return figure


def _tile(images: Shaped[np.ndarray, "n h w c"], columns: int) -> tuple[Picture, int, int]:
    """The images with white between them, and the distance from one to the next, down and across."""
    shades = images if images.dtype == np.uint8 else np.asarray(to_uint8(jnp.asarray(images)))
    shades = shades if shades.shape[-1] == 3 else np.repeat(shades[..., :1], 3, axis=-1)
    n, height, width, _ = shades.shape
    rows = -(-n // columns)
    scale = max(1, min(WIDTH // (columns * width), 4 * WIDTH // (rows * height)))  # what is tall stays a picture
    shades = shades.repeat(scale, 1).repeat(scale, 2)
    height, width = scale * height + GAP, scale * width + GAP
    tiled = np.full((rows * columns, height, width, 3), 255, np.uint8)
    tiled[:n, :-GAP, :-GAP] = shades
    tiled = tiled.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    return tiled.reshape(rows * height, columns * width, 3)[:-GAP, :-GAP], height, width
