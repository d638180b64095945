"""Clean-up: components below a size are removed, per class.

Source: the paper's section 3.4 (components under 150 voxels). Components are those of
`scipy.ndimage.label` with 26 neighbours.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

_NEIGHBOURS_26 = np.ones((3, 3, 3), np.uint8)


def remove_small_components(
    classes: NDArray[np.uint8], min_voxels: int
) -> tuple[NDArray[np.uint8], int]:
    """Set every component of a class that has fewer than `min_voxels` voxels to background.

    Args:
        classes: `(X, Y, Z)` uint8, 0 is background. Not changed.
        min_voxels: smallest component that stays; 0 and 1 keep all.

    Returns:
        The cleaned array and the number of components removed. The empty case: no voxel
        above 0 gives an equal array and 0.
    """
    cleaned = classes.copy(order="K")
    if min_voxels <= 1 or not cleaned.any():
        return cleaned, 0
    removed = 0
    for value, box in enumerate(ndimage.find_objects(classes), start=1):
        if box is None:
            continue
        components, count = ndimage.label(classes[box] == value, _NEIGHBOURS_26)
        small = np.bincount(components.ravel(), minlength=count + 1) < min_voxels
        small[0] = False
        removed += int(np.count_nonzero(small))
        if small.any():
            cleaned[box][small[components]] = 0
    return cleaned, removed
