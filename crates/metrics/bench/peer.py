"""A peer of bench-assignment: one library at one work.

    python peer.py LIBRARY KIND FOLDER

FOLDER holds shape.json and the arrays that `bench-assignment` wrote. The computed value is written there as
LIBRARY.value. Arrays are in memory before the clock starts.
"""

import json
import os
import pathlib
import sys

from side import serve

library, kind, folder = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
shape = json.loads((folder / "shape.json").read_text())
os.environ["OMP_NUM_THREADS"] = str(shape["threads"])

import numpy as np


def version(module):
    import importlib.metadata as metadata
    return f"{library} {metadata.version({'sklearn': 'scikit-learn', 'faiss': 'faiss-cpu'}.get(module, module))}"


def k_means(x):
    """From given centres for a number of iterations: the inertia."""
    k, d = shape["clusters"], shape["d"]
    start = np.fromfile(folder / "centres.f32", np.float32).reshape(k, d)
    if library == "scikit-learn":
        from sklearn.cluster import KMeans
        return lambda n: KMeans(k, init=start, n_init=1, max_iter=n, tol=0).fit(x).inertia_, version("sklearn")
    if library == "faiss":
        import faiss
        faiss.omp_set_num_threads(shape["threads"])

        def run(n):
            # Without these two limits faiss trains on a sample.
            model = faiss.Kmeans(d, k, niter=n, max_points_per_centroid=10**9, min_points_per_centroid=1)
            model.train(x, init_centroids=start)
            return float(model.index.search(x, 1)[0].sum(dtype=np.float64))
        return run, version("faiss")
    import torch
    torch.set_num_threads(shape["threads"])
    points = torch.from_numpy(x)

    def run(n):
        centres = torch.from_numpy(start.copy())
        squares = (points * points).sum(1)
        nearest = torch.empty(len(points), dtype=torch.long)
        # The last assignment moves no centre, as in the other libraries.
        for iteration in range(n + 1):
            halves, inertia, c = (centres * centres).sum(1), 0.0, centres.t()
            for first in range(0, len(points), 8192):
                part = slice(first, first + 8192)
                value, nearest[part] = torch.addmm(halves, points[part], c, alpha=-2).min(1)
                inertia += float((value + squares[part]).sum(dtype=torch.float64))
            if iteration < n:
                sums = torch.zeros_like(centres).index_add_(0, nearest, points)
                counts = torch.bincount(nearest, minlength=k).float()
                centres[counts > 0] = sums[counts > 0] / counts[counts > 0, None]
        return inertia
    return run, version("torch")


def restarts(x):
    """To convergence, several times from greedy k-means++: the inertia."""
    from sklearn.cluster import KMeans
    k, restarts, tolerance = shape["clusters"], shape["restarts"], 1e-4
    return lambda n: KMeans(k, n_init=restarts, max_iter=n, tol=tolerance, random_state=0).fit(x).inertia_, version("sklearn")


def neighbours(x):
    """Exact neighbours by inner product, self taken out: the sum of the products with them."""
    k = shape["neighbours"]
    if library == "faiss":
        import faiss
        faiss.omp_set_num_threads(shape["threads"])

        def search():
            index = faiss.IndexFlatIP(shape["d"])
            index.add(x)
            return index.search(x, k + 1)[1]
    else:
        import torch
        torch.set_num_threads(shape["threads"])
        points = torch.from_numpy(x)
        points = points.bfloat16() if library == "torch-bf16" else points

        def search():
            parts = [(points[i:i + 2048] @ points.t()).topk(k + 1, dim=1).indices for i in range(0, len(points), 2048)]
            return torch.cat(parts).numpy()

    def value(found):
        # Of every 50th row, in f64: who finds other neighbours has a lower sum.
        total, others = 0.0, x.astype(np.float64)
        for i in range(0, len(x), 50):
            row = found[i]
            total += float((others[row[row != i][:k]] @ others[i]).sum())
        return total
    return lambda n: search(), version("faiss" if library == "faiss" else "torch"), value


def draw_map(x):
    """t-SNE with the library's defaults (perplexity 30: 90 neighbours): the positions, which our side judges."""
    import openTSNE
    early = 250

    def run(n):
        model = openTSNE.TSNE(n_iter=max(1, n - early), early_exaggeration_iter=min(n, early), n_jobs=shape["threads"],
                              random_state=0, metric="cosine")
        np.asarray(model.fit(x), np.float32).tofile(folder / f"{library}.map")
        return 0.0
    return run, version("openTSNE")


def scores(x):
    """ACC, NMI and ARI: their sum."""
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    clusters, classes = (np.fromfile(folder / f, np.uint32).astype(np.int64) for f in ("clusters.u32", "classes.u32"))
    k = shape["clusters"]

    def run(n):
        table = np.bincount(clusters * k + classes, minlength=k * k).reshape(k, k)
        rows, columns = linear_sum_assignment(table, maximize=True)
        accuracy = table[rows, columns].sum() / len(classes)
        return accuracy + normalized_mutual_info_score(classes, clusters) + adjusted_rand_score(classes, clusters)
    return run, version("sklearn")


x = np.fromfile(folder / "points.f32", np.float32).reshape(-1, shape["d"]) if "d" in shape else None
works = {"k-means": k_means, "restarts": restarts, "neighbours": neighbours, "map": draw_map, "scores": scores}
run, note, *value = works[kind](x)


def leave(result):
    (folder / f"{library}.value").write_text(repr(float(value[0](result) if value else result)))


# To warm up, one iteration where a turn takes many seconds.
leave(run(1 if kind in ("k-means", "map") else shape["iterations"]))


def step():
    result = run(shape["iterations"])
    if kind == "k-means":
        leave(result)
    return 1


serve(step, note)
