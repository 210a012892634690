"""What a classifier of real images makes of samples."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Shaped

from gddim.data import Source, data_alone
from gddim.errors import from_extra


@runtime_checkable
class Labelled(Protocol):
    """A data set that knows the class of every record."""

    def train(self) -> Source: ...

    def test(self) -> Source: ...

    def known_classes(self) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]]:
        """The classes of the training and of the held-out records."""
        ...


def classify(
    data: Labelled, samples: Shaped[np.ndarray, "n ..."], asked: Int[np.ndarray, " n"] | None = None
) -> dict[str, Any]:
    """A support-vector classifier trained on the real records, and what it says about samples.

    `shares` of the samples by class; `confidence`, the mean probability of the class that wins, of the samples and of
    the held-out records; `accuracy` on the latter; `shares_asked`, of the samples by the class that they are to be of, and
    `as_asked`, the share of samples in which it finds that.
    """
    with from_extra("eval"):
        from sklearn.calibration import CalibratedClassifierCV
        from sklearn.svm import SVC

    train, test = data_alone(data.train()), data_alone(data.test())
    labels, held_out = data.known_classes()

    def pixels(records: np.ndarray) -> np.ndarray:
        return records.reshape(len(records), -1) / 255.0

    model = CalibratedClassifierCV(SVC(), ensemble=False)  # pyright: ignore[reportArgumentType]
    model.fit(pixels(train[np.arange(len(train))]), labels)
    real, drawn = (model.predict_proba(pixels(x)) for x in (test[np.arange(len(test))], samples))
    classes, won = np.unique(labels), drawn.argmax(1)
    told = {}
    if asked is not None:
        told = {
            "shares_asked": {int(c): float(np.mean(asked == c)) for c in classes},
            "as_asked": float(np.mean(classes[won] == asked)),
        }
    return {
        "shares": {int(c): float(np.mean(won == i)) for i, c in enumerate(classes)},
        "confidence": float(drawn.max(1).mean()),
        "confidence_real": float(real.max(1).mean()),
        "accuracy_real": float(np.mean(classes[real.argmax(1)] == held_out)),
        **told,
    }


def classes_in_words(found: dict[str, Any]) -> str:
    """What `classify` found, in a line."""
    asked = f"; {found['as_asked']:.1%} of the samples are of the class asked" if "as_asked" in found else ""
    shares = ", ".join(f"{name}: {share:.1%}" for name, share in found["shares"].items())
    return (
        f"classes among the samples: {shares}; mean probability of the winning class {found['confidence']:.3f}, "
        f"of held-out records {found['confidence_real']:.3f} (right in {found['accuracy_real']:.1%}){asked}"
    )
