"""The Python side of bench-data: two views of some pictures a turn, by two workers as users have it.

    python peer.py '{"peer": "torchvision", "source": "jpeg", "pixels": 96, "blur": true, "batch": 64, "images": 512}' FOLDER WORKERS

Operations and their parameters are BYOL's pair: resized crop, flip, jitter, grey, blur (always in view 1, in one of ten
of view 2), solarise (in one of five of view 2), normalise. Three peers: `torchvision` on Pillow's pictures,
`torchvision-v2` on tensors with torchvision's own JPEG decoder, `lightly` with its BYOL transforms.
A turn is one epoch of a DataLoader with persistent workers, so that nothing is made between turns.
"""

import io
import json
import os
import sys

from side import serve

import numpy
import torch
import torch.utils.data
from PIL import Image

work, folder, workers = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
size, blur = work["pixels"], work["blur"]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def by_torchvision(library, second, to_floats):
    operations = [
        library.RandomResizedCrop(size, scale=(0.08, 1.0), antialias=True),
        library.RandomHorizontalFlip(0.5),
        library.RandomApply([library.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        library.RandomGrayscale(0.2),
    ]
    if blur:
        kernel = max(3, size // 10 // 2 * 2 + 1)
        operations.append(library.RandomApply([library.GaussianBlur(kernel, (0.1, 2.0))], p=0.1 if second else 1.0))
    if second:
        operations.append(library.RandomSolarize(128, p=0.2))
    return library.Compose(operations + to_floats + [library.Normalize(MEAN, STD)])


def both_views():
    if work["peer"] == "lightly":
        from lightly.transforms import BYOLView1Transform, BYOLView2Transform
        first, second = (1.0, 0.1) if blur else (0.0, 0.0)
        return [BYOLView1Transform(input_size=size, gaussian_blur=first),
                BYOLView2Transform(input_size=size, gaussian_blur=second)]
    if work["peer"] == "torchvision":
        from torchvision import transforms
        to_floats = [transforms.ToTensor()]
    else:
        from torchvision.transforms import v2 as transforms
        to_floats = [transforms.ToDtype(torch.float32, scale=True)]
    return [by_torchvision(transforms, second, to_floats) for second in (False, True)]


class Pictures(torch.utils.data.Dataset):
    def __init__(self):
        self.views = both_views()
        self.tensors = work["peer"] == "torchvision-v2"
        if work["source"] == "jpeg":
            self.files = sorted(entry.path for entry in os.scandir(folder) if entry.name.endswith(".jpg"))
        else:
            bytes = numpy.fromfile(os.path.join(folder, "arrays"), dtype=numpy.uint8)
            self.arrays = bytes.reshape(-1, size, size, 3)

    def __len__(self):
        return work["images"]

    def picture(self, index):
        if work["source"] == "arrays":
            array = self.arrays[index % len(self.arrays)]
            return torch.from_numpy(array).permute(2, 0, 1) if self.tensors else Image.fromarray(array)
        path = self.files[index % len(self.files)]
        if self.tensors:
            from torchvision import io as files
            return files.decode_jpeg(files.read_file(path), mode=files.ImageReadMode.RGB)
        with open(path, "rb") as file:
            return Image.open(io.BytesIO(file.read())).convert("RGB")

    def __getitem__(self, index):
        picture = self.picture(index)
        return tuple(view(picture) for view in self.views)


torch.set_num_threads(1)
loader = torch.utils.data.DataLoader(Pictures(), batch_size=work["batch"], num_workers=workers, shuffle=True,
                                     persistent_workers=True, worker_init_fn=lambda _: torch.set_num_threads(1))


def step():
    return sum(len(first) for first, _ in loader)


step()
serve(step)
