"""Makes the fixture of the k-means test: where scikit-learn ends from given centres. Needs numpy, scikit-learn.

    python make.py      writes k-means.json beside itself
"""

import json
import pathlib

import numpy as np
from sklearn.cluster import KMeans


def case(random, n, d, k, weighted=False):
    centres = random.normal(0, 1.5, (k, d))
    points = (centres[random.integers(0, k, n)] + random.normal(0, 1, (n, d))).round(3)
    start = points[:k]
    weights = random.integers(0, 9, n) / 4 if weighted else np.ones(n)
    found = KMeans(k, init=start, n_init=1, max_iter=300, tol=0, algorithm="lloyd").fit(points, sample_weight=weights)
    return {
        **({"weights": weights.tolist()} if weighted else {}),
        "n": n,
        "d": d,
        "k": k,
        "points": points.ravel().tolist(),
        "start": start.ravel().tolist(),
        "assignment": found.labels_.tolist(),
        "centres": found.cluster_centers_.ravel().round(9).tolist(),
        "inertia": found.inertia_,
    }


if __name__ == "__main__":
    random = np.random.default_rng(1)
    cases = [case(random, *shape) for shape in [(80, 3, 4), (60, 8, 6), (120, 2, 9), (40, 20, 3)]]
    random = np.random.default_rng(2)
    cases += [case(random, *shape, weighted=True) for shape in [(70, 4, 5), (50, 2, 3)]]
    lines = ",\n".join(json.dumps(c, separators=(",", ":")) for c in cases)
    (pathlib.Path(__file__).parent / "k-means.json").write_text('{"cases":[\n' + lines + "\n]}\n")
