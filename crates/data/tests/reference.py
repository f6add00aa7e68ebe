"""Writes torchvision.json: what torchvision's operations give, for the tests in src/views/agreement.rs.

    python reference.py > torchvision.json

Needs torch and torchvision. Pictures are made by a formula that the tests repeat, so that only results are kept: each
operation's values in 65535ths, and statistics of a pipeline's parts over 10,000 draws with their standard deviations.
"""

import json
import math

import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

DRAWS = 10_000


def picture(height, width):
    y, x, c = torch.meshgrid(torch.arange(height), torch.arange(width), torch.arange(3), indexing="ij")
    values = ((x * x * (c + 2) + y * y * (5 - c) + 3 * x * y) // 8 + 60 * c) % 256
    return values.permute(2, 0, 1).double() / 255


def operations():
    small = picture(11, 14)
    bicubic, bilinear = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR

    def cropped(part, size, mode):
        return F.resized_crop(small, *part, size, interpolation=mode, antialias=True).clamp(0, 1)

    return {
        "brightness 0.6": F.adjust_brightness(small, 0.6),
        "brightness 1.4": F.adjust_brightness(small, 1.4),
        "contrast 0.6": F.adjust_contrast(small, 0.6),
        "contrast 1.4": F.adjust_contrast(small, 1.4),
        "saturation 0.6": F.adjust_saturation(small, 0.6),
        "saturation 1.4": F.adjust_saturation(small, 1.4),
        "hue 0.1": F.adjust_hue(small, 0.1),
        "hue -0.3": F.adjust_hue(small, -0.3),
        "grey": F.rgb_to_grayscale(small, num_output_channels=3),
        "solarise": F.solarize(small, 128 / 255),
        "flip": F.horizontal_flip(small),
        "blur 5 0.7": F.gaussian_blur(small, [5, 5], [0.7, 0.7]),
        "blur 9 2": F.gaussian_blur(small, [9, 9], [2.0, 2.0]),
        "shrink": cropped([2, 1, 8, 12], [5, 6], bilinear),
        "enlarge": cropped([2, 1, 8, 12], [9, 13], bilinear),
        "shrink bicubic": cropped([0, 0, 11, 14], [4, 6], bicubic),
        "enlarge bicubic": cropped([3, 4, 5, 6], [8, 11], bicubic),
    }


def crops():
    """Share of the area, logarithm of width per height, and place of the middle of random crops."""
    draws = []
    crop, empty = v2.RandomResizedCrop(32), torch.empty(3, 60, 80)
    for _ in range(DRAWS):
        top, left, h, w = map(crop.make_params([empty]).get, ("top", "left", "height", "width"))
        draws.append([h * w / 4800, math.log(w / h), (left + w / 2) / 80, (top + h / 2) / 60])
    return draws


def pipeline(second):
    operations = [
        v2.RandomResizedCrop(32, antialias=True),
        v2.RandomHorizontalFlip(0.5),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(5, (0.1, 2.0))], p=0.1 if second else 1.0),
    ]
    if second:
        operations.append(v2.RandomSolarize(128 / 255, p=0.2))
    return v2.Compose(operations + [v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])


def views(second):
    """Of each view: means and deviations of its channels, whether it is grey, and how rough it is across."""
    whole, make, draws = picture(60, 80).float(), pipeline(second), []
    scale = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)
    shift = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
    for _ in range(DRAWS):
        view = make(whole)
        plain = view * scale + shift
        grey = float((plain[0] - plain[1]).abs().max() < 1e-4 and (plain[1] - plain[2]).abs().max() < 1e-4)
        rough = float((plain[:, :, 1:] - plain[:, :, :-1]).abs().mean())
        slope = float((plain[:, :, 16:] - plain[:, :, :16]).mean())
        draws.append([*view.mean((1, 2)).tolist(), *view.std((1, 2), correction=0).tolist(), grey, rough, slope])
    return draws


def rates():
    """How often each operation changed the picture."""
    whole = picture(60, 80)
    asked = {
        "flip": v2.RandomHorizontalFlip(0.5),
        "jitter": v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        "grey": v2.RandomGrayscale(0.2),
        "blur": v2.RandomApply([v2.GaussianBlur(5, (0.5, 2.0))], p=0.1),
        "solarise": v2.RandomSolarize(128 / 255, p=0.2),
    }
    return {name: sum(bool((make(whole) != whole).any()) for _ in range(DRAWS)) / DRAWS for name, make in asked.items()}


def statistics(draws):
    table = torch.tensor(draws, dtype=torch.float64)
    return [[round(float(mean), 6), round(float(deviation), 6)] for mean, deviation in zip(table.mean(0), table.std(0))]


torch.manual_seed(0)
torch.set_num_threads(1)
with torch.no_grad():
    found = {name: [round(v * 65535) for v in values.permute(1, 2, 0).flatten().tolist()] for name, values in operations().items()}
    result = {"draws": DRAWS, "crops": statistics(crops()), "rates": rates(),
              "view 1": statistics(views(False)), "view 2": statistics(views(True))}
print("{")
for name, values in result.items():
    print(f"{json.dumps(name)}: {json.dumps(values)},")
print('"operations": {')
print(",\n".join(f"{json.dumps(name)}: {json.dumps(values, separators=(',', ':'))}" for name, values in found.items()))
print("}}")
