"""Quantization-aware training in Ultralytics' own trainer: its data, losses, EMA, AMP, DDP, resume and validation.

    YOLO("best.pt").train(trainer=QatTrainer, data="set.yaml", imgsz=640, epochs=10, optimizer="AdamW", lr0=1e-4)

writes best.qat and last.qat beside best.pt and last.pt.
"""

from itertools import islice

from ultralytics.data import build_yolo_dataset
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import LOCAL_RANK, LOGGER, RANK

import qat
from qat.training.ultralytics_model import QuantizedModel, quantize_ultralytics, save_ultralytics

IMAGES, BATCH = 256, 16  # to calibrate on


class QatTrainer(DetectionTrainer):
    """For boxes; for masks: class QatSegmentationTrainer(QatTrainer, SegmentationTrainer)."""

    keep_float = ()  # patterns of what stays in float, as --keep-float takes them

    def get_model(self, cfg=None, weights=None, verbose=True):
        """The model of the float checkpoint, prepared; that of last.pt as it is, to go on."""
        if isinstance(weights, QuantizedModel):
            return weights
        model = quantize_ultralytics(str(self.args.model), self.args.imgsz, self.keep_float)
        if len(model.names) != self.data["nc"]:
            found = f"{self.args.model} has {len(model.names)} classes, and the data {self.data['nc']}"
            raise qat.UserError(f"{found}: train it on the data in float first")
        return model

    def build_dataset(self, img_path, mode="train", batch=None):
        """As Ultralytics', but never with rectangular batches: all images have the shape of the prepared network."""
        return build_yolo_dataset(self.args, img_path, batch, self.data, mode)

    def set_model_attributes(self):
        """Calibrates too, before Ultralytics copies the model for its average and for DDP, which takes rank 0's."""
        super().set_model_attributes()
        if not self.resume:
            loader = self.get_dataloader(self.data["train"], BATCH, rank=LOCAL_RANK)
            batches = (self.preprocess_batch(batch)["img"] for batch in islice(loader, IMAGES // BATCH))
            for line in qat.calibrate_ranges(self.model.prepared, batches):
                LOGGER.warning(line)

    def final_eval(self):
        """Validates best.pt, and writes the checkpoints to export."""
        super().final_eval()
        for file in (self.best, self.last):
            if RANK in {-1, 0} and file.exists():
                save_ultralytics(file.with_suffix(".qat"), load_checkpoint(file)[0])
