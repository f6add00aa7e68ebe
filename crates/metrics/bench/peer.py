"""One measurement of a peer of bench-assignment. Needs numpy, scipy, scikit-learn, faiss-cpu; torch if asked for.

    python peer.py LIBRARY WORK FOLDER    prints {"seconds", "processor", "memory", "value"}; exit status 3 if LIBRARY is not installed

FOLDER holds shape.json and what `bench-assignment` wrote beside it. Time is that of the computation alone, on
arrays in memory; memory is what it added to the process's peak, in bytes.
"""

import importlib.util
import json
import os
import pathlib
import resource
import sys
import time


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def k_means(library, x, shape, folder):
    """From given centres for a number of iterations: the inertia."""
    k, iterations, d = shape["clusters"], shape["iterations"], shape["d"]
    start = np.fromfile(folder / "centres.f32", np.float32).reshape(k, d)
    if library == "scikit-learn":
        from sklearn.cluster import KMeans
        return lambda: KMeans(k, init=start, n_init=1, max_iter=iterations, tol=0).fit(x).inertia_
    if library == "faiss":
        import faiss
        faiss.omp_set_num_threads(shape["threads"])

        def run():
            # Without these two limits faiss trains on a sample.
            model = faiss.Kmeans(d, k, niter=iterations, max_points_per_centroid=10**9, min_points_per_centroid=1)
            model.train(x, init_centroids=start)
            return float(model.index.search(x, 1)[0].sum(dtype=np.float64))
        return run
    import torch
    torch.set_num_threads(shape["threads"])
    points, centres = torch.from_numpy(x), torch.from_numpy(start.copy())

    def run():
        squares = (points * points).sum(1)
        nearest = torch.empty(len(points), dtype=torch.long)
        for iteration in range(iterations):
            halves, inertia, c = (centres * centres).sum(1), 0.0, centres.t()
            for first in range(0, len(points), 8192):
                part = slice(first, first + 8192)
                value, nearest[part] = torch.addmm(halves, points[part], c, alpha=-2).min(1)
                inertia += float((value + squares[part]).sum(dtype=torch.float64))
            if iteration + 1 < iterations:
                sums = torch.zeros_like(centres).index_add_(0, nearest, points)
                counts = torch.bincount(nearest, minlength=k).float()
                centres[counts > 0] = sums[counts > 0] / counts[counts > 0, None]
        return inertia
    return run


def restarts(library, x, shape, folder):
    """To convergence, several times from greedy k-means++: the inertia."""
    from sklearn.cluster import KMeans
    k, iterations, n = shape["clusters"], shape["iterations"], shape["restarts"]
    return lambda: KMeans(k, n_init=n, max_iter=iterations, tol=1e-4, random_state=0).fit(x).inertia_


def neighbours(library, x, shape, folder):
    """Exact neighbours by inner product, self included: the sum of the neighbours' indices, without self."""
    k = shape["neighbours"]
    if library == "faiss":
        import faiss
        faiss.omp_set_num_threads(shape["threads"])

        def run():
            index = faiss.IndexFlatIP(shape["d"])
            index.add(x)
            return index.search(x, k + 1)[1]
    else:
        import torch
        torch.set_num_threads(shape["threads"])
        points = torch.from_numpy(x)
        points = points.bfloat16() if library == "torch-bf16" else points

        def run():
            parts = [(points[i:i + 2048] @ points.t()).topk(k + 1, dim=1).indices for i in range(0, len(points), 2048)]
            return torch.cat(parts).numpy()
    return lambda: float(run().sum(dtype=np.float64) - np.arange(len(x)).sum(dtype=np.float64))


def scores(library, x, shape, folder):
    """ACC, NMI and ARI: their sum."""
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    clusters, classes = (np.fromfile(folder / f, np.uint32).astype(np.int64) for f in ("clusters.u32", "classes.u32"))
    k = shape["clusters"]

    def run():
        table = np.bincount(clusters * k + classes, minlength=k * k).reshape(k, k)
        rows, columns = linear_sum_assignment(table, maximize=True)
        accuracy = table[rows, columns].sum() / len(classes)
        return accuracy + normalized_mutual_info_score(classes, clusters) + adjusted_rand_score(classes, clusters)
    return run


def main():
    library, work, folder = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
    module = {"scikit-learn": "sklearn", "torch-bf16": "torch"}.get(library, library)
    if importlib.util.find_spec(module) is None:
        sys.exit(3)
    shape = json.loads((folder / "shape.json").read_text())
    os.environ["OMP_NUM_THREADS"] = str(shape["threads"])
    global np
    import numpy as np
    x = np.fromfile(folder / "points.f32", np.float32).reshape(-1, shape["d"]) if "d" in shape else None
    run = {"k-means": k_means, "restarts": restarts, "neighbours": neighbours, "scores": scores}[work](library, x, shape, folder)
    before, processor, start = peak(), time.process_time(), time.perf_counter()
    value = run()
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    print(json.dumps({"seconds": seconds, "processor": processor, "memory": peak() - before, "value": float(value)}))


if __name__ == "__main__":
    main()
