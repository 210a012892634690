"""Statistics of a set of samples in a feature space, with where they come from; what an evaluation compares."""

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int, Shaped

from gddim.data import LABEL, ArraySource, Source, x0_and_cond
from gddim.errors import UserError, from_extra
from gddim.evaluation import metrics
from gddim.evaluation.features import FeatureSpace
from gddim.evaluation.metrics import Moments, ScoreSums
from gddim.evaluation.provenance import software
from gddim.parallel import agree, to_host
from gddim.storage import write_whole

SUBSET = 5000  # features kept for the metrics that compare pairs: KID, energy distance, precision and recall
CLASSES = 20  # more have no moments of their own: each takes a covariance, 32 MB of Inception features
TURN = 1024  # records whose moments are taken together: each merge passes over every covariance
OF_CLASS = "frechet of class "
FEW = 10_000  # below so many samples a Fréchet distance is biased enough that its name must tell their number


def npz(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of an npz file. Raises ValueError for a single one, and whatever NumPy raises for damaged bytes."""
    with io.BytesIO(content) as file:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise ValueError(f"it is one array {loaded.dtype} {loaded.shape}, no .npz file")
        return dict(loaded)


def check_shapes(a: Sequence[int], b: Sequence[int]) -> None:
    """Raise `UserError` for records of unlike shapes, which cannot be compared number by number."""
    if tuple(a) == tuple(b):
        return
    grey = tuple(a[:-1]) == tuple(b[:-1]) and {a[-1], b[-1]} == {1, 3}
    cause = ": image files are read in colour and arrays as they are, so give both as files or both as arrays"
    raise UserError(f"records {tuple(a)} and {tuple(b)} cannot be compared pixel by pixel{cause if grey else ''}")


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Moments of a stream of features, its first `SUBSET` features, the sums of its Inception Score, its origin; and the
    moments of each of a few classes, where it has such."""

    moments: Moments
    subset: Float[np.ndarray, "m d"]
    scores: ScoreSums | None
    origin: dict[str, Any]
    classes: dict[int, Moments] = dataclasses.field(default_factory=dict)

    @staticmethod
    def of(
        features: Shaped[np.ndarray, "b d"],
        space: FeatureSpace,
        first: int,
        origin: dict[str, Any],
        labels: Int[np.ndarray, " b"] | None = None,
    ) -> "Statistics":
        """Of samples `first`, `first + 1`, … of a stream, of these classes."""
        features = np.asarray(features)
        p = space.probabilities(features)
        scores = None if p is None else ScoreSums.of(p, first)
        kept = features[: max(SUBSET - first, 0)].astype(np.float32)
        few = [] if labels is None else [int(k) for k in np.unique(labels) if k >= 0]
        return Statistics(
            Moments.of(features), kept, scores, origin, {k: Moments.of(features[labels == k]) for k in few}
        )

    def then(self, later: "Statistics") -> "Statistics":
        """Of this stream followed by a later part of it."""
        scores = self.scores.merge(later.scores) if self.scores and later.scores else self.scores
        subset = np.concatenate([self.subset, later.subset]) if len(later.subset) else self.subset
        classes = {k: moments.merge(later.classes[k]) for k, moments in self.classes.items() if k in later.classes}
        return Statistics(
            self.moments.merge(later.moments), subset, scores, self.origin, self.classes | later.classes | classes
        )

    @property
    def count(self) -> int:
        return self.moments.count

    def digest(self) -> str:
        """Tells apart statistics that differ in any bit."""
        parts = [self.moments.mean, self.moments.scatter, self.subset]
        parts += [part for _, each in sorted(self.classes.items()) for part in (each.mean, each.scatter)]
        return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()[:16]

    def check_space(self, name: str, shape: Sequence[int] | None) -> None:
        """Raise `UserError` unless they were taken in the feature space of this name and, where it tells shapes of records
        apart, of records of this shape; None for one that nobody knows."""
        if self.origin["features"] != name:
            raise UserError(f"different feature spaces cannot be compared: {self.origin['features']} and {name}")
        if "shape" in self.origin and shape is not None:
            check_shapes(self.origin["shape"], shape)

    def save(self, path: os.PathLike, **more: np.ndarray) -> None:
        """Write an npz file, with `more` arrays for other readers, that appears whole or not at all."""
        arrays: dict[str, Any] = more | {f"moments.{k}": v for k, v in dataclasses.asdict(self.moments).items()}
        for number, moments in self.classes.items():
            arrays |= {f"class {number}.{k}": v for k, v in dataclasses.asdict(moments).items()}
        if self.scores:
            arrays |= {f"scores.{k}": v for k, v in dataclasses.asdict(self.scores).items()}
        buffer = io.BytesIO()
        np.savez(buffer, subset=self.subset, origin=np.array(json.dumps(self.origin)), **arrays)
        write_whole(epath.Path(path), buffer.getvalue())

    @staticmethod
    def load(path: os.PathLike) -> "Statistics":
        """Read what `save` wrote. Raises `UserError` for anything else."""
        try:
            arrays = npz(epath.Path(path).read_bytes())
            if "moments.mean" not in arrays:
                raise ValueError(f"its arrays are {', '.join(arrays)}, not those of python -m gddim.evaluation stats")
            parts: dict[str, dict[str, Any]] = {
                part: {key.removeprefix(f"{part}."): v for key, v in arrays.items() if key.startswith(f"{part}.")}
                for part in dict.fromkeys(("moments", "scores", *(key.partition(".")[0] for key in arrays)))
            }
            classes = {int(part[6:]): of for part, of in parts.items() if part.startswith("class ")}
            for of in (parts["moments"], *classes.values()):
                of["count"] = int(of["count"])
            subset, origin, d = arrays["subset"], json.loads(str(arrays["origin"])), parts["moments"]["mean"].shape
            if (parts["moments"]["scatter"].shape, subset.shape[1:], len(d)) != (2 * d, d, 1):
                raise ValueError("the shapes of its arrays do not fit")
            if not isinstance(origin["features"], str):
                raise ValueError("it does not name its feature space")
            scores = ScoreSums(**parts["scores"]) if parts["scores"] else None
            return Statistics(
                Moments(**parts["moments"]), subset, scores, origin, {k: Moments(**of) for k, of in classes.items()}
            )
        except Exception as error:  # a file of that name may be anything
            why = f"it lacks the array {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{path} holds no statistics that can be read: {why}") from error


@eqx.filter_jit
def features_of(space: FeatureSpace, samples: Shaped[Array, "b ..."], devices: int = 1) -> Float[Array, "b d"]:
    """The one compiled program of a feature space and a shape, for samples split over that many devices.

    Each takes at most `space.chunk` of its own at a time, however many there are.
    """
    local = len(samples) // devices
    parts = -(-local // space.chunk)
    if parts == 1:
        return space(samples)
    size = -(-local // parts)
    own = samples.reshape(devices, local, *samples.shape[1:])
    own = jnp.pad(own, ((0, 0), (0, parts * size - local), *((0, 0),) * (samples.ndim - 1)))
    turns = own.reshape(devices, parts, size, *samples.shape[1:]).swapaxes(0, 1)
    found = jax.lax.map(lambda x: space(x.reshape(devices * size, *samples.shape[1:])), turns)
    found = found.reshape(parts, devices, size, -1).swapaxes(0, 1).reshape(devices, parts * size, -1)
    return found[:, :local].reshape(len(samples), -1)


def source_statistics(
    source: Source, space: FeatureSpace, name: str, sharding: jax.sharding.Sharding | None = None, progress: bool = True
) -> Statistics:
    """Of a whole data set, and of its classes where records have labels of at most `CLASSES`, read in a shuffled order so
    that the subset is a sample of it.

    Devices take `space.chunk` records each at a time, whatever their number, so that it changes no bit of a feature.
    """
    with from_extra("eval"):
        from tqdm import tqdm

    order = np.random.default_rng(0).permutation(len(source))
    size = space.chunk * (sharding.num_devices if sharding else 1)
    origin = {"source": name, "records": len(source), "features": space.name}
    origin |= space.details(x0_and_cond(source[order[:64]])[0]) | software()
    found, classes = None, set()
    with tqdm(total=len(source), desc=name, unit="img", disable=None if progress else True) as bar:
        for start in range(0, len(source), turn := size * -(-TURN // size)):
            features, labels = [], []
            for indices in np.split(order[start : start + turn], range(size, min(turn, len(source) - start), size)):
                padded = np.concatenate([indices, np.full(size - len(indices), indices[0])])
                x0, cond = x0_and_cond(source[padded])
                batch = jax.device_put(x0, sharding)
                features.append(to_host(features_of(space, batch, len(batch) // space.chunk))[: len(indices)])
                labels += [cond[LABEL][: len(indices)]] if cond and LABEL in cond else []
                bar.update(len(indices))
            classes |= {int(k) for part in labels for k in np.unique(part) if k >= 0}
            told = np.concatenate(labels) if labels and len(classes) <= CLASSES else None
            part = Statistics.of(np.concatenate(features), space, start, origin, told)
            found = found.then(part) if found else part
    if found is None:
        raise UserError(f"{name} holds no records")
    return found if len(classes) <= CLASSES else dataclasses.replace(found, classes={})


def cached_statistics(
    source: Source, space: FeatureSpace, name: str, folder: os.PathLike, sharding: jax.sharding.Sharding | None = None
) -> Statistics:
    """`source_statistics`, kept in `folder` under a name that follows from the space and the records: all of those that
    are in memory, 1,024 of those that have to be read.
    """
    count = len(source) if isinstance(source, ArraySource) else min(len(source), 1024)
    probe = hashlib.sha256()
    for rows in np.array_split(np.linspace(0, len(source) - 1, count).astype(int), max(1, -(-count // 1024))):
        x0, cond = x0_and_cond(source[rows])  # some at a time, for a file that is mapped may be larger than memory
        for part in (x0, *(cond or {}).values()):
            probe.update(np.ascontiguousarray(part).data)
    key = json.dumps([name, space.name, len(source), source.shape, probe.hexdigest()])
    path = epath.Path(folder) / f"statistics-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    if agree(path.exists(), np.all):
        return Statistics.load(path)
    found = source_statistics(source, space, name, sharding)
    if jax.process_index() == 0:
        found.save(path)
    return found


def compare(samples: Statistics, reference: Statistics, names: tuple[str, ...]) -> dict[str, float]:
    """The metrics of these names between two statistics, and the standard errors that some have.

    Raises `UserError` when they were taken in different feature spaces, or of records of unlike shapes in pixels.
    """
    reference.check_space(samples.origin["features"], samples.origin.get("shape"))
    found: dict[str, float] = {}
    if "frechet" in names:
        found["frechet"] = metrics.frechet_distance(samples.moments, reference.moments)
        for k in sorted(samples.classes.keys() & reference.classes.keys()):
            of, real = samples.classes[k], reference.classes[k]
            if min(of.count, real.count) > 1:
                found[f"{OF_CLASS}{k}"] = metrics.frechet_distance(of, real)
    if "kid" in names:
        found["kid"], found["kid_error"] = metrics.kid(samples.subset, reference.subset)
    if "energy" in names:
        found["energy"] = metrics.energy_distance(samples.subset, reference.subset)
    if "precision_recall" in names:
        found["precision"], found["recall"] = metrics.precision_recall(samples.subset, reference.subset)
    if samples.scores:
        found["inception_score"], found["inception_score_spread"] = samples.scores.score()
    return found
