"""Trains TEMI's heads with PyTorch: all heads in one batched product, from the parameters and on the rows of a folder."""

import json
import os
import pathlib
import sys

from side import serve

folder = pathlib.Path(sys.argv[1])
shape = json.loads((folder / "shape.json").read_text())
os.environ["OMP_NUM_THREADS"] = str(shape["threads"])

import numpy as np
import torch
from torch.nn.functional import gelu, log_softmax, normalize

torch.set_num_threads(shape["threads"])
heads, width, hidden = shape["heads"], shape["width"], shape["hidden"]
bottleneck, clusters, pairs = shape["bottleneck"], shape["clusters"], shape["pairs"]
rows = torch.from_numpy(np.fromfile(folder / "rows.f32", np.float32).reshape(2 * pairs, width))
flat = torch.from_numpy(np.fromfile(folder / "heads.f32", np.float32).reshape(heads, -1))
sizes = [(hidden, width), (hidden,), (bottleneck, hidden), (bottleneck,), (clusters, bottleneck), (clusters,)]
parts = flat.split([int(np.prod(size)) for size in sizes], dim=1)
online = [part.reshape(heads, *size).clone().requires_grad_() for part, size in zip(parts, sizes)]
target = [part.detach().clone() for part in online]
weights, biases = [online[i] for i in (0, 2, 4, 5)], [online[i] for i in (1, 3)]
groups = [{"params": weights, "weight_decay": 1e-4}, {"params": biases, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=2e-4, fused=True)
marginal = torch.full((heads, clusters), 1 / clusters)


def logits(parameters):
    w1, b1, w2, b2, directions, scales = parameters
    x = rows.expand(heads, -1, -1)
    x = gelu(torch.baddbmm(b1[:, None], x, w1.transpose(1, 2)))
    x = normalize(torch.baddbmm(b2[:, None], x, w2.transpose(1, 2)), dim=2)
    return torch.bmm(x, normalize(directions, dim=2).transpose(1, 2)) * scales[:, None] / 0.1


def step():
    global marginal
    with torch.no_grad():
        q = log_softmax(logits(target), dim=2)
        memberships = q.exp()
        marginal = 0.9 * marginal + 0.1 * memberships.mean(1)
        agreed = (memberships[:, :pairs] * memberships[:, pairs:]).sum(2).mean(0)
        others, agreed = q.roll(pairs, 1), agreed.repeat(2)
        log_marginal = marginal.clamp_min(1e-8).log()[:, None]
    p = log_softmax(logits(online), dim=2)
    losses = -(agreed * (0.6 * (p + others) - log_marginal).logsumexp(2)).mean(1)
    optimizer.zero_grad()
    losses.mean().backward()
    optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(target, [part.detach() for part in online], 0.01)
    return losses.detach()


def turn():
    for _ in range(shape["steps"]):
        losses = step()
    return losses


(folder / "torch.loss").write_text(str(float(turn().mean())))
serve(lambda: turn() is not None and shape["steps"] * pairs, f"PyTorch {torch.__version__}")
