"""Clean-up: removal of small connected components, per class.

Source: the paper's section 3.4 (components under 150 voxels). Components are computed by
`scipy.ndimage.label` with 26-connectivity.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_NEIGHBOURS_26 = np.ones((3, 3, 3), np.uint8)


def remove_small_components(
    classes: NDArray[np.uint8], min_voxels: int
) -> tuple[NDArray[np.uint8], int]:
    """Set connected components of fewer than `min_voxels` voxels to background, per class.

    Args:
        classes: `(X, Y, Z)` uint8, 0 is background. Not modified.
        min_voxels: Minimum component size in voxels; 0 and 1 remove nothing.

    Returns:
        Cleaned copy, and the number of removed components. Without any voxel above 0, an equal
        copy and 0.
    """
    cleaned = classes.copy(order="K")
    if min_voxels <= 1 or not cleaned.any():
        return cleaned, 0
    from scipy import ndimage  # slow import: as long as the rest of the runtime

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
