"""A decoder for python -m deploy.evaluate --decoder: a box for each cell of a map, as many detectors have it.

The network answers `scores` [classes, h, w], before the sigmoid, and `distances` [4, h, w]: from the middle of a cell
to the left, upper, right and lower edge of its box, in cells.
"""

import numpy as np

from deploy.decoders import suppress


def boxes(outputs, size):
    """Outputs of one image by name, and (height, width) of the network's input -> boxes, scores and classes."""
    scores = 1 / (1 + np.exp(-outputs["scores"].reshape(len(outputs["scores"]), -1)))
    rows, columns = outputs["scores"].shape[1:]
    y, x = (np.mgrid[:rows, :columns] + 0.5).reshape(2, -1)
    left, top, right, bottom = outputs["distances"].reshape(4, -1)
    cell = np.array([size[1] / columns, size[0] / rows] * 2)
    found = np.stack([x - left, y - top, x + right, y + bottom], 1) * cell  # pixels of the input
    likely = np.flatnonzero(scores.max(0) > 0.001)
    found, best, classes = found[likely], scores.max(0)[likely], scores.argmax(0)[likely]
    kept = suppress(found, best, classes, most_overlap=0.6)
    return found[kept], best[kept], classes[kept]
