"""The PyTorch side of bench-embed: some batches through a ResNet on running statistics a turn.

    python peer.py '{"backbone": "resnet18", "pixels": 32, "batch": 128, "precision": "bf16"}' BATCHES THREADS

Channels last, bf16 by autocast, compiled with frozen weights, so that batch norm is folded into the convolutions.
Where compiling fails, batch norm is folded by hand and the network runs as it is, and the row says so.
"""

import json
import sys

from side import serve

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

work, batches, threads = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
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

    def fold(self):
        self.conv1, self.bn1 = fuse_conv_bn_eval(self.conv1, self.bn1), nn.Identity()
        self.conv2, self.bn2 = fuse_conv_bn_eval(self.conv2, self.bn2), nn.Identity()
        if isinstance(self.shortcut, nn.Sequential):
            self.shortcut = fuse_conv_bn_eval(*self.shortcut)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet(name, pixels):
    """With a 3x3 stem for pictures of at most 32 pixels, else 7x7 with stride 2 and a max-pool."""
    blocks = {"resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3]}[name]
    if pixels <= 32:
        layers = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    else:
        layers = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    before = 64
    for stage, count in enumerate(blocks):
        for block in range(count):
            layers.append(Block(before, 64 << stage, 2 if stage > 0 and block == 0 else 1))
            before = 64 << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


net = resnet(work["backbone"], work["pixels"]).eval().to(memory_format=torch.channels_last)
shape = (work["batch"], 3, work["pixels"], work["pixels"])
pictures = torch.randn(shape).contiguous(memory_format=torch.channels_last)


def stepping(network):
    def step():
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            for _ in range(batches):
                network(pictures)
        return batches * work["batch"]
    return step


def compiled():
    import torch._inductor.config
    torch._inductor.config.freezing = True
    step = stepping(torch.compile(net))
    step()
    step()
    return step


def eager():
    net[0], net[1] = fuse_conv_bn_eval(net[0], net[1]), nn.Identity()
    for block in net.modules():
        if isinstance(block, Block):
            block.fold()
    step = stepping(net.to(memory_format=torch.channels_last))
    step()
    return step


try:
    step, note = compiled(), "compiled"
except Exception as error:  # Whatever a compiler can throw: the row says that it did.
    print(error, file=sys.stderr)
    step, note = eager(), f"eager, as torch.compile failed: {type(error).__name__}"
serve(step, note)
