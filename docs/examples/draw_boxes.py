"""From an image file to drawn boxes, with the engine of a YOLO that was calibrated with --decode.

The photo may be of any size, or, for an engine that was exported with --source-size, of that size.

python docs/examples/draw_boxes.py runs/yolo/model.engine photo.jpg boxes.png
"""

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps
from torchvision.ops import batched_nms, box_convert

from deploy import Engine
from deploy.fitting import Fit, fitted
from deploy.reference import network_input
from qat.base.artifact import read_sidecar


def detect(engine, sidecar, photo, least_score=0.25, most_overlap=0.5):
    """Boxes [N, 4] as left, top, right, bottom in pixels of the photo, scores [N] and classes [N], the best first."""
    given = sidecar.preprocessing
    images = fitted(photo, given)[None]  # uint8 [1, H, W, 3], in a letterbox, or as it is where the network makes it
    found = torch.from_numpy(engine(network_input(images, sidecar))[0])  # [4 + classes, cells]
    scores, classes = found[4:].max(0)
    likely = scores >= least_score
    boxes, scores, classes = box_convert(found[:4, likely].T, "cxcywh", "xyxy"), scores[likely], classes[likely]
    kept = batched_nms(boxes, scores, classes, most_overlap)
    in_photo = Fit.of(upright(photo).size, given).back(boxes[kept].numpy())
    return torch.from_numpy(in_photo), scores[kept], classes[kept]


def upright(photo):
    """The image as a person sees it: cameras note how to turn it."""
    return ImageOps.exif_transpose(Image.open(photo)).convert("RGB")


def draw(photo, boxes, scores, classes):
    """The photo with its boxes."""
    image = upright(photo)
    pen = ImageDraw.Draw(image)
    for box, score, label in zip(boxes.tolist(), scores.tolist(), classes.tolist(), strict=True):
        pen.rectangle(box, outline="red", width=2)
        pen.text((box[0] + 2, box[1]), f"{label} {score:.2f}", fill="yellow")
    return image


if __name__ == "__main__":
    path, photo, output = sys.argv[1:]
    with Engine.load(path) as engine:
        draw(photo, *detect(engine, read_sidecar(Path(path), "engine"), photo)).save(output)
