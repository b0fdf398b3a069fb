"""Semantic segmentation over a data set: one confusion matrix of all pixels, and the numbers that follow from it."""

import dataclasses

import numpy as np

IGNORED = 255


@dataclasses.dataclass(frozen=True)
class SegmentationMetrics:
    """Shares, 0 to 1; tables print them x 100.

    Attributes:
        miou: mean over classes of intersection / union, without classes that neither truth nor prediction have.
        pixel_accuracy: of all labelled pixels, those predicted right.
        mean_accuracy: mean over the classes of the truth of the share of their pixels that are predicted right.
        ious: float64 [C], intersection / union of each class; NaN where the union is empty.
    """

    miou: float
    pixel_accuracy: float
    mean_accuracy: float
    ious: np.ndarray


def confusion_matrix(prediction: np.ndarray, target: np.ndarray, classes: int, ignored: int = IGNORED) -> np.ndarray:
    """Counts pixels: int64 [classes, classes], rows the truth, columns the prediction.

    Args:
        prediction: integers [...] from 0 to classes - 1.
        target: integers [...], from 0 to classes - 1, or `ignored`: such pixels are not counted.
        classes: C.
        ignored: the label of pixels without one.

    Raises:
        ValueError: shapes that differ, or a number out of range.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"expected prediction and target of one shape, got {prediction.shape} and {target.shape}")
    labelled = target != ignored
    predicted, true = prediction[labelled].astype(np.int64), target[labelled].astype(np.int64)
    for name, values in (("prediction", predicted), ("target", true)):
        if values.size and not 0 <= values.min() <= values.max() < classes:
            raise ValueError(f"{name}: expected classes 0 to {classes - 1}, got {values.min()} to {values.max()}")
    return np.bincount(true * classes + predicted, minlength=classes**2).reshape(classes, classes)


def segmentation_metrics(confusion: np.ndarray) -> SegmentationMetrics:
    """The metrics of a data set.

    Args:
        confusion: [C, C] of `confusion_matrix`, summed over all images.

    Raises:
        ValueError: no pixel was counted.
    """
    if confusion.sum() == 0:
        raise ValueError("confusion: expected labelled pixels, got none")
    hits, true = np.diag(confusion).astype(np.float64), confusion.sum(1)
    union = true + confusion.sum(0) - hits
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: such a class does not enter the mean
        ious, accuracies = hits / union, hits / true
    return SegmentationMetrics(
        miou=float(np.nanmean(ious)),
        pixel_accuracy=float(hits.sum() / confusion.sum()),
        mean_accuracy=float(np.nanmean(accuracies)),
        ious=ious,
    )
