"""The InceptionV3 network of 2015-12-05 that FID is defined by, with its weights from the published PyTorch file."""

import dataclasses
import hashlib
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8

from gddim.data.images import to_uint8
from gddim.data.sources import data_folder
from gddim.errors import MissingWeights, UserError
from gddim.torch_reader import read_torch

CONVENTIONS = ("pytorch-fid", "tf1")
PRECISIONS = ("float32", "bfloat16")
SIZE = 299
URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
# SHA-256 of the files whose weights are known to be right; PyTorch names its files after the first eight digits.
DIGESTS = {
    "6726825d": "pt_inception-2015-12-05-6726825d.pth",
    "01e1ebd69ad2d81adb0959d0923421c84c9cfbdefd3e0888da943079fff8fdec": "pt_inception_trunk.pth",
}

# The network as data. A tuple runs one part after another, a list side by side and joins their channels.
_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "max/2", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "max/2")
_A = [
    "branch1x1",
    ("branch5x5_1", "branch5x5_2"),
    ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
    ("mean", "branch_pool"),
]
_B = ["branch3x3", ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"), "max/2"]
_C = [
    "branch1x1",
    ("branch7x7_1", "branch7x7_2", "branch7x7_3"),
    ("branch7x7dbl_1", "branch7x7dbl_2", "branch7x7dbl_3", "branch7x7dbl_4", "branch7x7dbl_5"),
    ("mean", "branch_pool"),
]
_D = [("branch3x3_1", "branch3x3_2"), ("branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4"), "max/2"]
_E1 = [
    "branch1x1",
    ("branch3x3_1", ["branch3x3_2a", "branch3x3_2b"]),
    ("branch3x3dbl_1", "branch3x3dbl_2", ["branch3x3dbl_3a", "branch3x3dbl_3b"]),
    ("mean", "branch_pool"),
]
_E2 = [*_E1[:3], ("max", "branch_pool")]  # where other Inceptions average: a slip in 2015 that FID has kept
_MIXED = {
    "5b": _A,
    "5c": _A,
    "5d": _A,
    "6a": _B,
    "6b": _C,
    "6c": _C,
    "6d": _C,
    "6e": _C,
    "7a": _D,
    "7b": _E1,
    "7c": _E2,
}
_STRIDE_2 = {
    "Conv2d_1a_3x3",
    "Mixed_6a.branch3x3",
    "Mixed_6a.branch3x3dbl_3",
    "Mixed_7a.branch3x3_2",
    "Mixed_7a.branch7x7x3_4",
}
_UNPADDED = _STRIDE_2 | {"Conv2d_2a_3x3", "Conv2d_4a_3x3"}


class Conv(eqx.Module):
    """Convolution, normalisation (folded into it) and rectifier, on one example (H, W, C)."""

    kernel: Float[Array, "h w c_in c_out"]
    bias: Float[Array, " c_out"]
    stride: int = eqx.field(static=True)
    padding: str = eqx.field(static=True)

    def __call__(self, x: Float[Array, "h w c_in"]) -> Float[Array, "h2 w2 c_out"]:
        return jax.nn.relu(self._convolve(x) + self.bias[None, None, :])

    def _convolve(self, x: Float[Array, "h w c_in"]) -> Float[Array, "h2 w2 c_out"]:
        if self.kernel.shape[:2] == (1, 1):  # a product, which XLA:CPU runs twice as fast under that name
            return jnp.matmul(x, self.kernel[0, 0], precision=jax.lax.Precision.HIGHEST)

        def run(x: Array, padding: str | tuple) -> Array:
            return jax.lax.conv_general_dilated(
                x[None],
                self.kernel,
                (self.stride, self.stride),
                padding,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision=jax.lax.Precision.HIGHEST,
            )[0]

        if self.padding == "SAME":
            return run(x, "SAME")
        height, width = ((side - self.kernel.shape[0]) // self.stride + 1 for side in x.shape[:2])
        return jax.lax.platform_dependent(
            x,  # XLA:CPU runs an unpadded convolution at half the speed of one with an edge, whose outputs are cut off here
            cpu=lambda x: run(x, ((0, 1), (0, 1)))[:height, :width],
            default=lambda x: run(x, "VALID"),
        )


class InceptionV3(eqx.Module):
    """One image (299, 299, 3), scaled as its convention says, to the 2,048 features before the last layer."""

    convs: dict[str, Conv]
    classifier: Float[Array, "2048 classes"] | None

    def __call__(self, x: Float[Array, "299 299 3"]) -> Float[Array, " 2048"]:
        x = self._run(x, _STEM, "")
        for name, block in _MIXED.items():
            x = self._run(x, block, f"Mixed_{name}.")
        return x.mean(axis=(0, 1))

    def _run(self, x: Array, part: str | tuple | list, prefix: str) -> Array:
        if isinstance(part, tuple):
            for each in part:
                x = self._run(x, each, prefix)
            return x
        if isinstance(part, list):
            return jnp.concatenate([self._run(x, each, prefix) for each in part], axis=-1)
        if part in _POOLS:
            return _POOLS[part](x)
        return self.convs[prefix + part](x)


def _max_pool(x: Float[Array, "h w c"], stride: int, padding: str) -> Float[Array, "h2 w2 c"]:
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (3, 3, 1), (stride, stride, 1), padding)


def _mean_pool(x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
    """Mean over the neighbours that exist: TensorFlow does not count its padding, PyTorch does."""

    def total(x: Array) -> Array:
        return jax.lax.reduce_window(x, jnp.zeros((), x.dtype), jax.lax.add, (3, 3, 1), (1, 1, 1), "SAME")

    return total(x) / total(jnp.ones((*x.shape[:2], 1), x.dtype))


_POOLS = {
    "max": lambda x: _max_pool(x, 1, "SAME"),
    "max/2": lambda x: _max_pool(x, 2, "VALID"),
    "mean": _mean_pool,
}


def _from_torch(tensors: dict[str, np.ndarray]) -> InceptionV3:
    """The network from a state dictionary: `gain (W∗x − mean)/√(var + 0.001) + bias` becomes one convolution."""
    convs = {}
    for name in sorted(key.removesuffix(".conv.weight") for key in tensors if key.endswith(".conv.weight")):
        gain, bias, mean, variance = (
            tensors[f"{name}.bn.{part}"].astype(np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gain / np.sqrt(variance + 1e-3)
        kernel = tensors[f"{name}.conv.weight"].transpose(2, 3, 1, 0) * scale
        stride, padding = (2 if name in _STRIDE_2 else 1), ("VALID" if name in _UNPADDED else "SAME")
        convs[name] = Conv(_float32(kernel), _float32(bias - mean * scale), stride, padding)
    classifier = _float32(tensors["fc.weight"].T) if "fc.weight" in tensors else None
    return InceptionV3(convs, classifier)


def _float32(x: np.ndarray) -> Array:
    return jnp.asarray(x, jnp.float32)


def _interpolation(size: int, convention: str) -> Float[np.ndarray, "299 size"]:
    """Weights of bilinear interpolation from `size` pixels to 299, without antialiasing in either convention."""
    step = size / SIZE
    position = np.arange(SIZE) * step if convention == "tf1" else (np.arange(SIZE) + 0.5) * step - 0.5
    position = np.clip(position, 0, size - 1)
    low = np.floor(position).astype(int)
    weights = np.zeros((SIZE, size))
    weights[np.arange(SIZE), low] += 1 - (position - low)
    weights[np.arange(SIZE), np.minimum(low + 1, size - 1)] += position - low
    return weights.astype(np.float32)


def find_weights() -> Path:
    """The weight file in the data folder, or where PyTorch keeps it. Raises `MissingWeights` that says what to put where."""
    folder = data_folder(None) / "inception"
    published, trunk = DIGESTS.values()
    candidates = [folder / published, Path.home() / ".cache/torch/hub/checkpoints" / published, folder / trunk]
    for path in candidates:
        if path.is_file():
            return path
    raise MissingWeights(f"no Inception weights: put {URL} into {folder}")


class InceptionFeatures(eqx.Module):
    """The feature space of FID, KID and Inception Score: images `(B, H, W, 1 or 3)` to `(B, 2048)` float32.

    Images are uint8, or floating in [-1, 1] and then rounded to it first.

    `convention` names how images reach 299×299: "pytorch-fid" (pixel centres at half positions, scaled to [-1, 1]; also
    clean-fid's legacy mode) or "tf1" (TensorFlow 1 corners, `(x − 128)/128`; Heusel's original and torch-fidelity).
    Statistics of different conventions are different spaces: `name` keeps them apart. With `precision` "bfloat16" the
    network runs in it, for speed; `details` says by how much its features then differ.
    """

    network: InceptionV3
    digest: str = eqx.field(static=True)
    convention: str = eqx.field(static=True)
    precision: str = eqx.field(static=True, default="float32")
    metrics: tuple[str, ...] = eqx.field(static=True, default=("frechet", "kid", "precision_recall"))
    chunk: int = eqx.field(static=True, default=32)

    @staticmethod
    def load(
        path: Path | None = None, convention: str = "pytorch-fid", precision: str = "float32"
    ) -> "InceptionFeatures":
        """From a published weight file, by default the one that `find_weights` finds, checked against its digest."""
        path = path or find_weights()
        for given, accepted in ((convention, CONVENTIONS), (precision, PRECISIONS)):
            if given not in accepted:
                raise UserError(f"Inception features: {given!r} given, accepted are {', '.join(accepted)}")
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        if path.is_file() and not any(digest.startswith(known) for known in DIGESTS):
            raise UserError(
                f"{path} has SHA-256 {digest}, which is none of the known weight files: {', '.join(DIGESTS)}"
            )
        return InceptionFeatures(_from_torch(read_torch(path)), digest, convention, precision)

    @property
    def name(self) -> str:
        return f"inception-2015-12-05 {self.convention} {self.precision}, weights {self.digest[:16]}"

    def __call__(self, images: Shaped[Array, "b h w c"]) -> Float[Array, "b 2048"]:
        if images.shape[-1] not in (1, 3):
            raise UserError(f"Inception features need images of 1 or 3 channels, got {images.shape}")
        if jnp.issubdtype(images.dtype, jnp.floating):
            images = to_uint8(images)  # in [-1, 1], as a data set may hold them
        rows, columns = (jnp.asarray(_interpolation(n, self.convention)) for n in images.shape[1:3])
        x = jnp.broadcast_to(images, (*images.shape[:3], 3)).astype(jnp.float32)
        x = x / 127.5 - 1 if self.convention == "pytorch-fid" else (x - 128) / 128
        x = jnp.einsum("Hh,bhwc,Ww->bHWc", rows, x, columns, precision=jax.lax.Precision.HIGHEST)
        network = jax.tree.map(lambda leaf: leaf.astype(self.precision), self.network)
        return jax.vmap(network)(x.astype(self.precision)).astype(jnp.float32)

    def details(self, images: UInt8[np.ndarray, "b h w c"]) -> dict[str, float]:
        """For bfloat16, the root mean square of the difference to features in float32, as a share of that of these."""
        if self.precision == "float32":
            return {}
        exact = eqx.filter_jit(dataclasses.replace(self, precision="float32"))(jnp.asarray(images))
        error = eqx.filter_jit(self)(jnp.asarray(images)) - exact
        return {"deviation_from_float32": float(jnp.linalg.norm(error) / jnp.linalg.norm(exact))}

    def probabilities(self, features: Float[np.ndarray, "b 2048"]) -> Float[np.ndarray, "b classes"] | None:
        """Class probabilities: softmax of the last layer, without its bias as in the original score."""
        if self.network.classifier is None:
            return None
        logits = features.astype(np.float64) @ np.asarray(self.network.classifier, np.float64)
        exponential = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponential / exponential.sum(axis=1, keepdims=True)
