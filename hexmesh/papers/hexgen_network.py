"""HexGen's 58 GPUs as a matrix of delays, and the regions that k-means finds in it.

The matrix is not the published one: it is drawn from its block statistics (regions of 28, 16, 8 and 6 GPUs; delays
of 0.45 to 0.50 inside a region and 9.75 to 10.25 between two, in its own unit, not symmetric).
"""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy.cluster.vq import kmeans2

REGION_SIZES = (28, 16, 8, 6)
INSIDE, BETWEEN = (0.45, 0.50), (9.75, 10.25)
N_STARTS = 8

Matrix = npt.NDArray[np.float64]


def delay_matrix(rng: random.Random) -> Matrix:
    """(58, 58) delays; 0 from a GPU to itself."""
    region = [index for index, size in enumerate(REGION_SIZES) for _ in range(size)]
    return np.array(
        [
            [
                0.0 if a == b else rng.uniform(*(INSIDE if region[a] == region[b] else BETWEEN))
                for b in range(len(region))
            ]
            for a in range(len(region))
        ]
    )


def regions(delays: Matrix, n_regions: int, rng: random.Random) -> list[int]:
    """The region of every row: k-means over rows, the best of N_STARTS, numbered in order of appearance."""
    _, labels = min((_k_means(delays, n_regions, rng) for _ in range(N_STARTS)), key=lambda found: found[0])
    first = {label: at for at, label in reversed(list(enumerate(labels)))}
    numbers = {label: number for number, label in enumerate(sorted(first, key=first.__getitem__))}
    return [numbers[label] for label in labels]


def elbow(delays: Matrix, rng: random.Random, *, max_regions: int = 10, least_gain: float = 0.5) -> int:
    """The number of regions after which one more no longer takes away `least_gain` of the spread that is left."""
    spreads = [
        min(_k_means(delays, n_regions, rng)[0] for _ in range(N_STARTS))
        for n_regions in range(1, max_regions + 1)
    ]
    gains = [1 - after / before for before, after in pairwise(spreads)]
    return next((at + 1 for at, gain in enumerate(gains) if gain < least_gain), max_regions)


def _k_means(rows: Matrix, k: int, rng: random.Random) -> tuple[float, list[int]]:
    """Sum of squared distances to the centres, and the label of every row."""
    centres, labels = kmeans2(rows, k, minit="++", rng=np.random.default_rng(rng.getrandbits(64)))
    return float(((rows - centres[labels]) ** 2).sum()), [int(label) for label in labels]
