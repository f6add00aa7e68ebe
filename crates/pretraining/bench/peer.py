"""The PyTorch side of bench-train: one step of BYOL a turn, on noise in memory.

    python peer.py '{"backbone": "resnet18", "width": 64, "channels": 3, "hidden": 4096, "output": 256, "pixels": 32,
                     "batch": 128, "precision": "bf16"}' THREADS

Two views through the online network forward and backward, two through the target without gradient, the loss, SGD
with momentum, the moving average. Channels last; bf16 by autocast, which keeps weights and statistics in f32; fused
optimizer where there is one. Each view passes alone, so that batch statistics are per view, as in ours.
"""

import contextlib
import json
import sys

from side import serve

import torch
import torch.nn.functional as F
from torch import nn

work, threads = json.loads(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(threads)
torch.manual_seed(0)


class Block(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))."""

    def __init__(self, width_before, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(width_before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity()
        if stride != 1 or width_before != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x), inplace=True)


def resnet(name, pixels):
    """With a 3x3 stem for pictures of at most 32 pixels, else 7x7 with stride 2 and a max-pool."""
    width, channels = work["width"], work["channels"]
    blocks = {"resnet10": [1, 1, 1, 1], "resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3]}[name]
    if pixels <= 32:
        layers = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    else:
        layers = [nn.Conv2d(channels, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
                  nn.MaxPool2d(3, 2, 1)]
    before = width
    for stage, count in enumerate(blocks):
        for block in range(count):
            layers.append(Block(before, width << stage, 2 if stage > 0 and block == 0 else 1))
            before = width << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def perceptron(width, hidden, out):
    return nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out))


hidden, output = work["hidden"], work["output"]


def branch():
    net = nn.Sequential(resnet(work["backbone"], work["pixels"]), perceptron(8 * work["width"], hidden, output))
    return net.to(memory_format=torch.channels_last)


online, target, predictor = branch(), branch(), perceptron(output, hidden, output)
target.load_state_dict(online.state_dict())
target.requires_grad_(False)
parameters = [*online.parameters(), *predictor.parameters()]
settings = dict(lr=0.05, momentum=0.9, weight_decay=5e-4)
try:
    optimizer = torch.optim.SGD(parameters, fused=True, **settings)
except (RuntimeError, TypeError):
    optimizer = torch.optim.SGD(parameters, foreach=True, **settings)
followed, following = list(online.parameters()), list(target.parameters())
shape = (work["batch"], work["channels"], work["pixels"], work["pixels"])
views = [torch.randn(shape).contiguous(memory_format=torch.channels_last) for _ in range(2)]


def computing():
    bf16 = work["precision"] == "bf16"
    return torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else contextlib.nullcontext()


def regression_loss(prediction, projection):
    return (2 - 2 * F.cosine_similarity(prediction.float(), projection.float(), dim=1)).mean()


def step():
    with torch.no_grad(), computing():
        projections = [target(view) for view in views]
    with computing():
        predictions = [predictor(online(view)) for view in views]
    loss = (regression_loss(predictions[0], projections[1]) + regression_loss(predictions[1], projections[0])) / 2
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(following, followed, 1 - 0.996)
    loss.item()
    return work["batch"]


step()
serve(step)
