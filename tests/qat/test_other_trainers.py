"""Trainers of other libraries: docs/own-loop.md shows how they train a prepared model; here they are stopped and go on.

They are imported where they are used: that takes seconds, which every worker of the tests would spend.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from own_network import Net
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, TensorDataset

import qat

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:GPU available but not used:UserWarning:lightning"),  # on a machine that has one
]

IMAGES, LABELS = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3


def prepared() -> fx.GraphModule:
    torch.manual_seed(0)
    network = qat.prepare(Net(), input_shape={"x": (3, 16, 16)}).train()
    assert qat.calibrate_ranges(network, [IMAGES]) == []
    return network


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def in_lightning(network: nn.Module, *, hyperparameters: bool = False) -> Any:
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            if hyperparameters:
                self.save_hyperparameters()
            self.network = network

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            assert all(module.training for module in self.network.modules())
            return F.cross_entropy(self.network(batch[0]), batch[1])

        def validation_step(self, batch: list[Tensor], index: int) -> None:
            assert not any(module.training for module in self.network.modules())
            self.log("val_loss", F.cross_entropy(self.network(batch[0]), batch[1]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    return Classifier(network)


def fit(module: Any, folder: Path, epochs: int, checkpoint: str | None = None) -> str:
    """Trains, and returns the checkpoint that Lightning wrote after the last epoch."""
    from lightning import Trainer

    options: Any = {"default_root_dir": folder, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=epochs, **options)
    data = TensorDataset(IMAGES, LABELS)
    trainer.fit(module, DataLoader(data, 4), DataLoader(data, 4), ckpt_path=checkpoint)
    written: str = trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    return written


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning:lightning")  # each run has a folder of its own
def test_lightning_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    fit(in_lightning(whole := prepared()), tmp_path, 3)
    stopped = fit(in_lightning(prepared()), tmp_path, 1)
    fit(in_lightning(resumed := prepared()), tmp_path, 3, stopped)
    assert_equal(resumed, whole)
    with pytest.raises(AssertionError):
        assert_equal(resumed, prepared())


@pytest.mark.filterwarnings("ignore:.*'network':UserWarning:lightning")  # it says so, once at every step
def test_lightning_leaves_the_network_out_of_the_hyperparameters(tmp_path: Path) -> None:
    module = in_lightning(trained := prepared(), hyperparameters=True)
    written = fit(module, tmp_path, 1)
    type(module).load_from_checkpoint(written, network=(loaded := prepared()))
    assert_equal(loaded, trained)


def test_transformers_goes_on_to_the_same_weights_and_saves_them(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    def loss(answer: Tensor, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        return F.cross_entropy(answer, labels, reduction="sum") / num_items_in_batch

    def train(network: nn.Module, **options: Any) -> Trainer:
        arguments = TrainingArguments(
            str(tmp_path),
            num_train_epochs=3,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            label_names=["labels"],
            eval_strategy="epoch",
            save_strategy="epoch",
            use_cpu=True,
            bf16=True,
        )
        data = [{"x": x, "labels": label} for x, label in zip(IMAGES, LABELS, strict=True)]
        trainer = Trainer(network, arguments, None, data, data, compute_loss_func=loss)  # type: ignore[arg-type]
        trainer.train(**options)
        return trainer

    train(whole := prepared())
    train(resumed := prepared(), resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(resumed, whole)
    qat.save_checkpoint(tmp_path / "model.qat", resumed)
    assert_equal(qat.load_checkpoint(tmp_path / "model.qat", Net()).model, whole)
    with pytest.raises(AssertionError):
        assert_equal(resumed, prepared())
