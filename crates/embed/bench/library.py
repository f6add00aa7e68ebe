"""A library's side of bench-embed: some batches a turn through DINOv2's network as users of the library call it.

    python peer.py LIBRARY '{"backbone": "vit-s14", "pixels": 224, "batch": 16}' WEIGHTS BATCHES THREADS

LIBRARY is transformers or timm. The network is in f32 and runs eagerly. It gets the weights of the file WEIGHTS, in
our names, and must give the feature of the picture that the file also has.
"""

import json
import sys

from side import serve

import torch

library, work, weights = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
batches, threads = int(sys.argv[4]), int(sys.argv[5])
torch.set_num_threads(threads)
torch.manual_seed(0)
DEPTH = 12


def tensors_of(path):
    """The tensors of a safetensors file."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = bytearray(file.read())
    header.pop("__metadata__", None)
    return {
        name: torch.frombuffer(data[slice(*entry["data_offsets"])], dtype=torch.float32).reshape(entry["shape"])
        for name, entry in header.items()
    }


def with_kinds(ours, theirs):
    """The names of a layer's weight and bias."""
    return [(f"{ours}.{kind}", f"{theirs}.{kind}") for kind in ("weight", "bias")]


def rename(given, cls, positions, patch, norm, block, layers, scales):
    """Our tensors by the names of a library. `layers` and `scales` have its names of ours within a block."""
    pairs = [("cls", cls), ("positions", positions), *with_kinds("patch", patch), *with_kinds("norm", norm)]
    for number in range(DEPTH):
        ours, theirs = f"blocks.{number}", block.format(number)
        for name, other in layers.items():
            pairs += with_kinds(f"{ours}.{name}", f"{theirs}.{other}")
        pairs += [(f"{ours}.{name}", f"{theirs}.{other}") for name, other in scales.items()]
    assert sorted(ours for ours, _ in pairs) == sorted(given)
    return {theirs: given[ours] for ours, theirs in pairs}


def fused(given):
    """With one layer for queries, keys and values."""
    kept = {name: tensor for name, tensor in given.items() if name.split(".")[-2:-1] not in (["q"], ["k"], ["v"])}
    for number in range(DEPTH):
        for kind in ("weight", "bias"):
            parts = [given[f"blocks.{number}.{name}.{kind}"] for name in "qkv"]
            kept[f"blocks.{number}.qkv.{kind}"] = torch.cat(parts)
    return kept


def with_patches(given, patches):
    """With positions for so many patches, which are all equal in the file, and for the class token, which has none."""
    row = given["positions"][:1]
    return {**given, "positions": torch.cat([torch.zeros_like(row), row.expand(patches, -1)])}


def load(net, state):
    theirs = net.state_dict()
    missing = net.load_state_dict({name: tensor.reshape(theirs[name].shape) for name, tensor in state.items()}, strict=False)
    assert all(name.endswith("mask_token") for name in missing.missing_keys), missing
    return net.eval()


def of_timm(given, width, pixels):
    import timm

    size = {384: "small", 768: "base"}[width]
    net = timm.create_model(f"vit_{size}_patch14_dinov2", pretrained=False, num_classes=0, img_size=pixels)
    layers = {"norm1": "norm1", "qkv": "attn.qkv", "out": "attn.proj", "norm2": "norm2", "up": "mlp.fc1", "down": "mlp.fc2"}
    scales = {"scale1": "ls1.gamma", "scale2": "ls2.gamma"}
    given = fused(with_patches(given, (pixels // 14) ** 2))
    state = rename(given, "cls_token", "pos_embed", "patch_embed.proj", "norm", "blocks.{}", layers, scales)
    return load(net, state)


def of_transformers(given, width, pixels):
    from transformers import Dinov2Config, Dinov2Model

    # As published: positions of 37 x 37 patches, which every forward pass resamples.
    config = Dinov2Config(hidden_size=width, num_attention_heads=width // 64, image_size=518, patch_size=14)
    net = Dinov2Model(config)
    layers = {"norm1": "norm1", "norm2": "norm2", "up": "mlp.fc1", "down": "mlp.fc2"}
    if "encoder.layer.0.attention.q_proj.weight" in net.state_dict():
        layers |= {name: f"attention.{name}_proj" for name in "qkv"} | {"out": "attention.o_proj"}
    else:  # Before version 5.
        layers |= {name[0]: f"attention.attention.{name}" for name in ("query", "key", "value")}
        layers |= {"out": "attention.output.dense"}
    scales = {"scale1": "layer_scale1.lambda1", "scale2": "layer_scale2.lambda1"}
    embeddings = [f"embeddings.{name}" for name in ("cls_token", "position_embeddings", "patch_embeddings.projection")]
    given = with_patches(given, 37 * 37)
    load(net, rename(given, *embeddings, "layernorm", "encoder.layer.{}", layers, scales))
    return lambda pictures: net(pixel_values=pictures).pooler_output


given = tensors_of(weights)
picture, feature = given.pop("picture"), given.pop("feature")
width = {"vit-s14": 384, "vit-b14": 768}[work["backbone"]]
net = {"timm": of_timm, "transformers": of_transformers}[library](given, width, work["pixels"])
pictures = torch.randn(work["batch"], 3, work["pixels"], work["pixels"])


def step():
    with torch.no_grad():
        for _ in range(batches):
            net(pictures)
    return batches * work["batch"]


with torch.no_grad():
    difference = ((net(picture) - feature).abs().max() / feature.abs().max()).item()
assert difference < 1e-3, f"not the network that ours is: its feature differs by {difference:.1e} of the largest value"
step()
serve(step, "eager")
