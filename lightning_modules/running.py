"""How Lightning runs: devices and strategies, progress, loggers, and silence about what users need not know."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.strategies import ModelParallelStrategy, Strategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from esmerge.errors import GOES_ON, InputError, Interrupted, first_line

StrategyName = Literal["auto", "ddp", "fsdp"]
_LOGGERS = {"csv": CSVLogger, "tensorboard": TensorBoardLogger, "wandb": WandbLogger}


@dataclass(frozen=True)
class Devices:
    """On what a model runs.

    Attributes:
        count: of devices; processes on a CPU.
        strategy: `ddp` puts the whole model on every device, `fsdp` shares the LLM's weights out; `auto` is `ddp` for
            more than one device.
        accelerator: as Lightning takes it: `auto`, `cpu`, `gpu`, ...
    """

    count: int = 1
    strategy: StrategyName = "auto"
    accelerator: str = "auto"

    def check(self, samples: int) -> None:
        """Raise `InputError` if there is not a sample for every device."""
        if self.count > samples:
            raise InputError(
                f"--devices {self.count} is more than the {samples} samples there are: use at most {samples}."
            )

    @property
    def sharded(self) -> bool:
        """Whether the ranks share the LLM's weights."""
        return self.strategy == "fsdp" and self.count > 1

    @property
    def on_cpu(self) -> bool:
        """Whether the model runs on the CPU."""
        return self.accelerator == "cpu" or (self.accelerator == "auto" and not torch.accelerator.is_available())

    def trainer(self, unused_parameters: bool = False, **options: Any) -> Trainer:
        """A Trainer for these devices.

        Args:
            unused_parameters: whether some of the trained parameters may have no part in a batch.
            options: of the Trainer.

        Raises:
            InputError: if the machine does not have them.
        """
        ddp = "ddp_find_unused_parameters_true" if unused_parameters else "ddp"
        strategy: str | Strategy = ddp if self.count > 1 else "auto"
        if self.sharded:
            # FSDP2, which also runs on CPUs; Lightning's `fsdp` is FSDP1, for GPUs alone.
            strategy = ModelParallelStrategy(data_parallel_size=self.count, tensor_parallel_size=1)
        try:
            return Trainer(
                accelerator=self.accelerator,
                devices=self.count,
                strategy=strategy,
                use_distributed_sampler=False,
                enable_model_summary=False,
                **options,
            )
        except (ValueError, RuntimeError, MisconfigurationException) as error:
            raise InputError(
                f"--accelerator {self.accelerator} --devices {self.count}: {first_line(error)}; choose others."
            ) from error


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are there in full or not at all, wherever temporary files of the system lie."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.partial")
        torch.save(checkpoint, partial)
        partial.replace(file)


class NamedProgress(TQDMProgressBar):
    """A progress bar that names the task at hand."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = names

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        super().on_test_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        self.test_progress_bar.set_description(self.names[dataloader_idx])


def make_loggers(names: Sequence[str], folder: Path) -> list[Logger]:
    """Lightning's loggers, which write into `folder`.

    Raises:
        InputError: for a name that is not known, or a logger that is not installed.
    """
    made: list[Logger] = []
    for name in names:
        if name not in _LOGGERS:
            raise InputError(f"--logger {name} is not known (known: {', '.join(_LOGGERS)}).")
        try:
            made.append(_LOGGERS[name](save_dir=folder, name=""))
        except ModuleNotFoundError as error:
            raise InputError(f"--logger {name} needs a package that is not installed: pip install {name}.") from error
    return made


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Drops Lightning's notes about hardware, loaders and products; Ctrl-C stays what it is."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for module in ("pytorch_lightning", "lightning_fabric", "torchmetrics"):
                warnings.filterwarnings("ignore", module=module)
            yield
    except SystemExit as end:
        # What Lightning makes of Ctrl-C, after it has stopped the other processes.
        raise Interrupted(GOES_ON) from end
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def progress_callbacks(names: Sequence[str], progress: bool) -> list[Callback]:
    """The progress bar, if there is to be one."""
    return [NamedProgress(names)] if progress else []
