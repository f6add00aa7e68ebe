"""Makes the fixtures of the tests: scores as scikit-learn computes them. Needs numpy, scipy, scikit-learn.

    python make.py      writes agreement.json and classes.json beside itself, silhouette.json beside assignment's tests
"""

import json
import pathlib
import warnings

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn import metrics

HERE = pathlib.Path(__file__).parent
LARGEST = 70  # Labels are written as one printable character each.


def pairs(random):
    """200 pairs of groupings: random, related, of unequal counts, and degenerate ones."""
    yield [0], [0]
    yield [0, 1], [0, 0]
    yield [0, 0], [0, 1]
    yield [0, 1], [1, 0]
    yield list(range(30)), list(range(30))
    yield list(range(30)), [0] * 30
    yield [0] * 30, list(range(30))
    yield [5] * 10, [3] * 10
    yield [0, 0, 1, 1], [0, 1, 0, 1]
    yield [0, 0, 0, 0, 1], [0, 0, 0, 0, 1]
    for i in range(190):
        n = int(random.integers(2, 120))
        a, b = (int(random.integers(1, min(n, LARGEST) + 1)) for _ in range(2))
        if i % 3 == 0:  # Few groups, as usual.
            a, b = 1 + a % 8, 1 + b % 8
        clusters = random.integers(0, a, n)
        classes = random.integers(0, b, n)
        if i % 2 == 0:  # Related groupings.
            classes = np.where(random.random(n) < 0.7, (clusters * 7 + 3) % b, classes)
        if i % 5 == 0:  # Very unequal sizes.
            clusters = np.where(random.random(n) < 0.8, 0, clusters)
        yield clusters.tolist(), classes.tolist()


def accuracy(clusters, classes):
    table = metrics.cluster.contingency_matrix(clusters, classes)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return table[rows, columns].sum() / len(clusters)


def agreement(clusters, classes):
    nmi = metrics.normalized_mutual_info_score
    return {
        "clusters": "".join(chr(ord("0") + k) for k in clusters),
        "classes": "".join(chr(ord("0") + k) for k in classes),
        "acc": accuracy(clusters, classes),
        "nmi": nmi(classes, clusters),
        "nmi-geometric": nmi(classes, clusters, average_method="geometric"),
        "nmi-max": nmi(classes, clusters, average_method="max"),
        "nmi-min": nmi(classes, clusters, average_method="min"),
        "ami": metrics.adjusted_mutual_info_score(classes, clusters),
        "ari": metrics.adjusted_rand_score(classes, clusters),
    }


def classes(random):
    """Groupings whose clusters are numbered like the classes: precision and recall of each."""
    for n, k in [(40, 3), (90, 7), (12, 5)]:
        truth = random.integers(0, k, n)
        found = np.where(random.random(n) < 0.6, truth, random.integers(0, max(2, k - 1), n))
        precision, recall, _, _ = metrics.precision_recall_fscore_support(truth, found, labels=range(k), zero_division=np.nan)
        yield {
            "k": k,
            "clusters": found.tolist(),
            "classes": truth.tolist(),
            "precision": [None if np.isnan(p) else p for p in precision.tolist()],
            "recall": [None if np.isnan(r) else r for r in recall.tolist()],
        }


def silhouettes(random):
    """Small sets of points with a grouping; a cluster of one point in the second."""
    for n, d, k in [(40, 3, 3), (25, 2, 4), (60, 5, 2)]:
        assignment = random.integers(0, k, n)
        assignment[:k] = range(k)
        if k == 4:
            assignment[assignment == 3] = 2
            assignment[3] = 3
        centres = random.normal(0, 2, (k, d))
        points = (centres[assignment] + random.normal(0, 1, (n, d))).astype(np.float32).round(3)
        yield {
            "n": n,
            "d": d,
            "k": k,
            "points": [round(float(x), 3) for x in points.ravel()],
            "assignment": assignment.tolist(),
            "silhouette": metrics.silhouette_score(points.astype(np.float64), assignment),
        }


def write(name, cases):
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    (HERE / name).write_text('{"cases":[\n' + lines + "\n]}\n")


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # scikit-learn warns that some groupings look like regression.
    random = np.random.default_rng(0)
    write("agreement.json", [agreement(*pair) for pair in pairs(random)])
    write("../../assignment/tests/silhouette.json", silhouettes(random))
    write("classes.json", classes(np.random.default_rng(1)))
