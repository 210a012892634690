"""Distances between two sets of samples, each from features that any feature space gives (rows are samples).

Everything here is NumPy in float64 on the host: no metric depends on a device, a batch size or an order of summation.
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int, Shaped

GOLDEN = (5**0.5 - 1) / 2  # of whose multiples the parts after the point are evenly spread, however many there are
Features = Shaped[np.ndarray, "_ d"]  # rows are samples; the number of them differs between sets


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """A mean and a covariance of unknown origin, as other programs' statistics files hold them."""

    mean: Float[np.ndarray, " d"]
    covariance: Float[np.ndarray, "d d"]

    @functools.cached_property
    def factor(self) -> Float[np.ndarray, "d r"]:
        return _factor(self.covariance)


@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, mean and scatter `Σ (x − mean)(x − mean)ᵀ` of a stream of vectors, in memory independent of its length.

    Two streams join by the pairwise update of Chan, Golub and LeVeque (1983), which subtracts no large numbers: the
    result is the same to rounding for every way to cut the stream.
    """

    count: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]

    @staticmethod
    def empty(dimension: int) -> "Moments":
        return Moments(0, np.zeros(dimension), np.zeros((dimension, dimension)))

    @staticmethod
    def of(features: Features) -> "Moments":
        """Moments of the rows of one array. A row that is not finite raises `ValueError`: it would spoil all others."""
        x = np.asarray(features, np.float64)
        if not len(x):
            return Moments.empty(x.shape[1])
        if not np.isfinite(x).all():
            bad = len(x) - int(np.isfinite(x).all(axis=1).sum())
            raise ValueError(f"features: {bad} of {len(x)} rows are not finite")
        mean = x.mean(axis=0)
        centred = x - mean
        return Moments(len(x), mean, centred.T @ centred)

    def merge(self, other: "Moments") -> "Moments":
        count = self.count + other.count
        if not count:
            return self
        step = other.mean - self.mean
        mean = self.mean + step * (other.count / count)
        scatter = np.outer(step * (self.count * other.count / count), step)
        scatter += self.scatter  # in place, as those of Inception features are 32 MB each
        scatter += other.scatter
        return Moments(count, mean, scatter)

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """Unbiased, `(d, d)`; needs two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        return self.scatter / (self.count - 1)

    @functools.cached_property
    def factor(self) -> Float[np.ndarray, "d r"]:
        """As `_factor`; kept, since a reference is compared with many sets."""
        return _factor(self.covariance)


def _factor(covariance: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d r"]:
    """A factor `A` with `A Aᵀ` = covariance and one column for each eigenvalue above rounding."""
    if not np.isfinite(covariance).all():
        raise ValueError("the covariance is not finite")
    values, vectors = np.linalg.eigh(covariance)
    if values[0] < -1e-6 * max(values[-1], 0.0):
        raise ValueError(f"the covariance has a negative eigenvalue {values[0]:.3g}")
    kept = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return vectors[:, kept] * np.sqrt(values[kept])


def frechet_distance(a: Moments | Gaussian, b: Moments | Gaussian) -> float:
    """Squared Wasserstein-2 distance of two Gaussians, `|μ_a − μ_b|² + Tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^{1/2})`.

    With `Σ = A Aᵀ` the last trace is the sum of singular values of `A_aᵀ A_b`: no root of a singular, unsymmetric
    product is taken, so fewer samples than dimensions are no special case. Never negative.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of dimension {a.mean.shape[0]} cannot be compared with those of {b.mean.shape[0]}")
    overlap = np.linalg.svd(a.factor.T @ b.factor, compute_uv=False).sum()
    spread = np.square(a.factor).sum() + np.square(b.factor).sum() - 2 * overlap
    return max(float(np.square(a.mean - b.mean).sum() + spread), 0.0)


def _row_blocks(x: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Slices of at most 1,024 rows: a matrix of all pairs is never held as a whole."""
    for start in range(0, len(x), 1024):
        yield (block := slice(start, start + 1024)), x[block]


def _kernel_sums(a: np.ndarray, b: np.ndarray, same: bool = False) -> tuple[np.ndarray, np.ndarray, float]:
    """Row sums, column sums and sum of squares of KID's kernel `(x·y/d + 1)³` over all pairs, of one set with itself over
    those of different samples."""
    rows, columns, squares = np.empty(len(a)), np.zeros(len(b)), 0.0
    for block, x in _row_blocks(a):
        kernel = (x @ b.T / a.shape[1] + 1) ** 3
        if same:
            kernel[np.arange(len(x)), np.arange(block.start, block.start + len(x))] = 0.0
        rows[block] = kernel.sum(axis=1)
        columns += kernel.sum(axis=0)
        squares += np.square(kernel).sum()
    return rows, columns, float(squares)


def _interaction(rows: np.ndarray, columns: np.ndarray, squares: float, pairs: int) -> float:
    """Variance of the mean of the kernel's doubly centred part, `k(x, y)` less its means over x and over y."""
    row_means, column_means = rows * len(rows) / pairs, columns * len(columns) / pairs
    return (
        squares / pairs - np.square(row_means).mean() - np.square(column_means).mean() + row_means.mean() ** 2
    ) / pairs


def kid(a: Features, b: Features) -> tuple[float, float]:
    """Kernel Inception distance (Bińkowski et al. 2018): the unbiased squared MMD, and its standard error.

    `Σ_{i≠j} k(a_i, a_j)/(n(n−1)) + the same for b − 2 Σ k(a_i, b_j)/(nm)`, `k(x, y) = (x·y/d + 1)³`; being unbiased it
    may be negative. The error is the jackknife's over both sets, less the part that it counts twice: the interaction
    of pairs, which is all there is when both sets follow one law.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    n, m = len(a), len(b)
    if min(n, m) < 3:
        raise ValueError(f"kid needs at least 3 samples of each set, got {n} and {m}")
    own_a, own_b, cross = _kernel_sums(a, a, same=True), _kernel_sums(b, b, same=True), _kernel_sums(a, b)
    pairs_a, pairs_b, pairs = n * (n - 1), m * (m - 1), n * m
    sum_a, sum_b, total = own_a[0].sum(), own_b[0].sum(), cross[0].sum()
    without_a = (sum_a - 2 * own_a[0]) / ((n - 1) * (n - 2)) - 2 * (total - cross[0]) / ((n - 1) * m)
    without_b = (sum_b - 2 * own_b[0]) / ((m - 1) * (m - 2)) - 2 * (total - cross[1]) / (n * (m - 1))
    jackknife = (n - 1) * without_a.var() + (m - 1) * without_b.var()
    interaction = (
        2 * _interaction(*own_a, pairs_a) + 2 * _interaction(*own_b, pairs_b) + 4 * _interaction(*cross, pairs)
    )
    variance = max(jackknife - interaction, interaction)  # the rest of it, what each sample does alone, is not negative
    return float(sum_a / pairs_a + sum_b / pairs_b - 2 * total / pairs), float(np.sqrt(max(variance, 0.0)))


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """All pairs, by one matrix product: thousands of features make direct differences too slow."""
    squares = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1)[None, :]
    return np.maximum(squares - 2 * a @ b.T, 0.0)


def _distance_sum(a: np.ndarray, b: np.ndarray) -> float:
    return float(sum(np.sqrt(_squared_distances(x, b)).sum() for _, x in _row_blocks(a)))


def energy_distance(a: Features, b: Features) -> float:
    """`2 E|X − Y| − E|X − X'| − E|Y − Y'|` (Székely, Rizzo 2013), unbiased, so two draws of one law average to 0."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    centre = a.mean(axis=0)
    a, b = a - centre, b - centre
    n, m = len(a), len(b)
    if min(n, m) < 2:
        raise ValueError(f"energy_distance needs at least 2 samples of each set, got {n} and {m}")
    within = _distance_sum(a, a) / (n * (n - 1)) + _distance_sum(b, b) / (m * (m - 1))
    return 2 * _distance_sum(a, b) / (n * m) - within


def _covered(points: np.ndarray, manifold: np.ndarray, k: int) -> float:
    """Share of `points` within some manifold point's distance to its own k-th neighbour (itself not counted)."""
    neighbours = [np.partition(_squared_distances(x, manifold), k, axis=1)[:, k] for _, x in _row_blocks(manifold)]
    radius = np.concatenate(neighbours)
    inside = [(_squared_distances(x, manifold) <= radius[None, :]).any(axis=1) for _, x in _row_blocks(points)]
    return float(np.concatenate(inside).mean())


def precision_recall(samples: Features, data: Features, k: int = 3) -> tuple[float, float]:
    """Precision: share of samples that lie in the data's k-nearest-neighbour manifold; recall: the reverse.

    Kynkäänniemi et al. 2019. Both depend on the set sizes: compare only figures of equal counts.
    """
    samples, data = np.asarray(samples, np.float64), np.asarray(data, np.float64)
    largest = min(len(samples), len(data)) - 1
    if not 1 <= k <= largest:
        raise ValueError(f"k: {k} given, accepted are 1 to {largest} (one less than the smaller set)")
    centre = data.mean(axis=0)
    samples, data = samples - centre, data - centre
    return _covered(samples, data, k), _covered(data, samples, k)


@dataclasses.dataclass(frozen=True)
class ScoreSums:
    """What the Inception Score needs of a stream: for each split, its count, `Σ p(y|x)` and `Σ p(y|x) log p(y|x)`."""

    counts: Int[np.ndarray, " splits"]
    classes: Float[np.ndarray, "splits classes"]
    negentropy: Float[np.ndarray, " splits"]

    @staticmethod
    def of(probabilities: Features, first: int = 0, splits: int = 10) -> "ScoreSums":
        """Sums over rows, of which row i (numbered from `first`) belongs to split `(i + r) mod splits`, r another for each
        `splits` rows in turn: so that none is of the classes that samples have in turn."""
        p = np.asarray(probabilities, np.float64)
        rows = np.arange(first, first + len(p))
        turn = (rows // splits * GOLDEN % 1 * splits).astype(int)
        member = (rows + turn) % splits == np.arange(splits)[:, None]
        information = (p * np.log(np.maximum(p, np.finfo(np.float64).tiny))).sum(axis=1)
        return ScoreSums(member.sum(axis=1), member @ p, member @ information)

    def merge(self, other: "ScoreSums") -> "ScoreSums":
        return ScoreSums(self.counts + other.counts, self.classes + other.classes, self.negentropy + other.negentropy)

    def score(self) -> tuple[float, float]:
        """`exp(E KL(p(y|x) ‖ p(y)))`: mean and standard deviation over the splits."""
        used = self.counts > 0
        counts = self.counts[used].astype(np.float64)
        marginal = self.classes[used] / counts[:, None]
        entropy = -(marginal * np.log(np.maximum(marginal, np.finfo(np.float64).tiny))).sum(axis=1)
        scores = np.exp(entropy + self.negentropy[used] / counts)
        return float(scores.mean()), float(scores.std())


def psnr(x: Float[np.ndarray, "*dims"], truth: Float[np.ndarray, "*dims"]) -> float:
    """Peak signal-to-noise ratio in dB of data in [−1, 1], `10 log₁₀(4 / mean (x − truth)²)`; 100 at most."""
    return float(10 * np.log10(4 / max(np.mean((np.asarray(x, np.float64) - truth) ** 2), 4e-10)))


def ssim(x: Float[np.ndarray, "h w c"], truth: Float[np.ndarray, "h w c"]) -> float:
    """Structural similarity of images in [−1, 1] (Wang et al. 2004): 1 for the same, the mean over windows and channels.

    Windows are Gaussian, 11 pixels wide and of standard deviation 1.5, or as wide as smaller images allow.
    """
    sides = [min(11, side - 1 + side % 2) for side in x.shape[:2]]
    weights = [np.exp(-((np.arange(n) - n // 2) ** 2) / (2 * 1.5**2)) for n in sides]
    kernel = np.multiply.outer(*(w / w.sum() for w in weights))

    def mean(image: np.ndarray) -> np.ndarray:
        windows = np.lib.stride_tricks.sliding_window_view(image, tuple(sides), (0, 1))
        return np.einsum("abcij,ij->abc", windows, kernel)

    x, y = np.asarray(x, np.float64), np.asarray(truth, np.float64)
    mx, my, c1, c2 = mean(x), mean(y), (0.01 * 2) ** 2, (0.03 * 2) ** 2
    vx, vy, covariance = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    found = (2 * mx * my + c1) * (2 * covariance + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return float(found.mean())


def inception_score(probabilities: Features, splits: int = 10) -> tuple[float, float]:
    """Inception Score (Salimans et al. 2016) of class probabilities: mean and standard deviation over splits."""
    if not 1 <= splits <= len(probabilities):
        raise ValueError(f"splits: {splits} given, accepted are 1 to {len(probabilities)} (the number of samples)")
    return ScoreSums.of(probabilities, splits=splits).score()
