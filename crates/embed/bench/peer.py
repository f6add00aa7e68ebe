"""The PyTorch side of bench-embed: some batches a turn through a ResNet on running statistics, or a transformer.

    python peer.py '{"backbone": "resnet18", "pixels": 32, "batch": 128, "precision": "bf16"}' BATCHES THREADS

Compiled with frozen weights. A ResNet is channels last with bf16 by autocast, and its batch norms are folded into
the convolutions; a transformer has bf16 weights and PyTorch's own attention.
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


class Bottleneck(nn.Module):
    """relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x)), the 3x3 in the middle."""

    def __init__(self, width_before, width, stride):
        super().__init__()
        self.convolutions = nn.ModuleList([
            nn.Conv2d(width_before, width, 1, bias=False),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.Conv2d(width, 4 * width, 1, bias=False),
        ])
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(width), nn.BatchNorm2d(4 * width)])
        self.shortcut = nn.Identity()
        if stride != 1 or width_before != 4 * width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_before, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))

    def fold(self):
        for at, norm in enumerate(self.norms):
            self.convolutions[at] = fuse_conv_bn_eval(self.convolutions[at], norm)
            self.norms[at] = nn.Identity()
        if isinstance(self.shortcut, nn.Sequential):
            self.shortcut = fuse_conv_bn_eval(*self.shortcut)

    def forward(self, x):
        y = F.relu(self.norms[0](self.convolutions[0](x)))
        y = F.relu(self.norms[1](self.convolutions[1](y)))
        return F.relu(self.norms[2](self.convolutions[2](y)) + self.shortcut(x))


def resnet(name, pixels):
    """With a 3x3 stem for pictures of at most 32 pixels, else 7x7 with stride 2 and a max-pool."""
    blocks = {"resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3], "resnet50": [3, 4, 6, 3]}[name]
    block_of, growth = (Bottleneck, 4) if name == "resnet50" else (Block, 1)
    if pixels <= 32:
        layers = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    else:
        layers = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    before = 64
    for stage, count in enumerate(blocks):
        for block in range(count):
            layers.append(block_of(before, 64 << stage, 2 if stage > 0 and block == 0 else 1))
            before = growth * (64 << stage)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class TransformerBlock(nn.Module):
    """x + scale * attention(norm(x)), then x + scale * mlp(norm(x))."""

    def __init__(self, width):
        super().__init__()
        self.heads = width // 64
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale1, self.scale2 = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width))

    def forward(self, x):
        n, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, tokens, 3, self.heads, 64).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        x = x + self.scale1 * self.out(y)
        return x + self.scale2 * self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """DINOv2's network; its feature is the class token after the last norm."""

    def __init__(self, width, pixels):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 14, 14)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, (pixels // 14) ** 2 + 1, width))
        self.blocks = nn.Sequential(*[TransformerBlock(width) for _ in range(12)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pictures):
        patches = self.patch(pictures).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(patches), -1, -1), patches], 1) + self.positions
        return self.norm(self.blocks(x))[:, 0]


half = work["precision"] == "bf16"
shape = (work["batch"], 3, work["pixels"], work["pixels"])
pictures = torch.randn(shape).contiguous(memory_format=torch.channels_last)
if work["backbone"].startswith("vit"):
    net = Transformer({"vit-s14": 384, "vit-b14": 768}[work["backbone"]], work["pixels"]).eval()
    if half:
        net, pictures = net.bfloat16(), pictures.bfloat16()
    half = False
else:
    net = resnet(work["backbone"], work["pixels"]).eval().to(memory_format=torch.channels_last)


def stepping(network):
    def step():
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
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
    if isinstance(net, Transformer):
        step = stepping(net)
        step()
        return step
    net[0], net[1] = fuse_conv_bn_eval(net[0], net[1]), nn.Identity()
    for block in net.modules():
        if isinstance(block, (Block, Bottleneck)):
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
