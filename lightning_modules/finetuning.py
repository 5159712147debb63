"""Fine-tunes a language model on prompts with answers: all of it, or PEFT's adapters and the encoders before it."""

from typing import Any, TypeAlias

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn.functional import cross_entropy

from esmerge.mllm import MllmForConditionalGeneration
from lightning_modules.data import AnswerBatch
from lightning_modules.shared_prefix import CausalLM, last_logits
from lightning_modules.soft_tokens import WithSoftIds, soft_token_table

VALIDATION_LOSS = "validation_loss"
TrainedModel: TypeAlias = CausalLM | MllmForConditionalGeneration


class AnswerFinetuning(LightningModule):
    """Trains whatever parameters of `model` require a gradient, with the loss on the answers' tokens only.

    Adapters in float32 on a bfloat16 base train well with `Trainer(precision="bf16-mixed")`: the arithmetic is
    bfloat16, the weights that the optimizer sees are not. Checkpoints hold the trained parameters and no others.

    Args:
        model: an LLM, or one with encoders, which are then trained along.
        learning_rate: its highest value.
        encoder_learning_rate: of the encoders; None for the same.
        warmup_share: of the steps, during which learning rates grow.
        weight_decay: of AdamW.
    """

    def __init__(
        self,
        model: TrainedModel,
        learning_rate: float = 5e-4,
        encoder_learning_rate: float | None = None,
        warmup_share: float = 0.1,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="model")
        self.model = model
        self.learning_rate = learning_rate
        self.encoder_learning_rate = learning_rate if encoder_learning_rate is None else encoder_learning_rate
        self.warmup_share = warmup_share
        self.weight_decay = weight_decay
        # A checkpoint lacks the frozen parameters on purpose.
        self.strict_loading = False

    def training_step(self, batch: AnswerBatch, batch_index: int) -> Tensor:
        loss = answer_loss(self.model, batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch.labels))
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        encoders = [parameter for name, parameter in trained.items() if name.startswith("encoders.")]
        others = [parameter for name, parameter in trained.items() if not name.startswith("encoders.")]
        groups: list[dict[str, Any]] = [{"params": others}, {"params": encoders, "lr": self.encoder_learning_rate}]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=self.learning_rate, weight_decay=self.weight_decay
        )
        steps = self.total_steps()
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_then_decay(step, steps, round(steps * self.warmup_share))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def total_steps(self) -> int:
        """How many steps the learning rate's rise and fall is spread over."""
        return int(self.trainer.estimated_stepping_batches)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {f"model.{name}" for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {
            name: tensor for name, tensor in checkpoint["state_dict"].items() if name in trained
        }


class JudgedFinetuning(AnswerFinetuning):
    """Its validation loss is the mean over all answers' tokens, however they are spread over batches and ranks.

    What chance there is (dropout) follows from the seed, the step and the rank alone, so that a training can go on.

    Args:
        model: as of `AnswerFinetuning`.
        seed: of what chance there is.
        steps: of the whole training.
        options: others of `AnswerFinetuning`.
    """

    def __init__(self, model: TrainedModel, seed: int, steps: int, **options: Any) -> None:
        super().__init__(model, **options)
        self.seed = seed
        self.steps = steps

    def total_steps(self) -> int:
        return self.steps

    def on_train_batch_start(self, batch: AnswerBatch, batch_idx: int) -> None:
        torch.manual_seed((self.seed * 1_000_003 + self.global_step) * 1_009 + self.global_rank)

    def on_validation_epoch_start(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: AnswerBatch, batch_index: int) -> None:
        tokens = (batch.labels >= 0).sum()
        loss = answer_loss(self.model, batch)
        self._sums += torch.stack([loss.double() * tokens, tokens.double()])

    def on_validation_epoch_end(self) -> None:
        sums: Tensor = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        self.log(VALIDATION_LOSS, (sums[0] / sums[1]).float(), prog_bar=True, rank_zero_only=False)


class StopEarly(EarlyStopping):
    """Also stops a training at once that goes on from where it had stopped early."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        trainer.should_stop = trainer.should_stop or self.wait_count >= self.patience


def answer_loss(model: TrainedModel, batch: AnswerBatch) -> Tensor:
    """The mean cross-entropy over the answers' tokens."""
    reader: Any = model
    if isinstance(model, MllmForConditionalGeneration):
        reader = WithSoftIds(model, soft_token_table(model, batch.features)) if batch.features else model.language_model
    logits = last_logits(reader, batch.tokens, last=batch.labels.shape[1])
    return cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten())


def warmup_then_decay(step: int, steps: int, warmup_steps: int) -> float:
    """The learning rate's factor: up in a straight line, then down to zero in another."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return max(0.0, (steps - step) / max(1, steps - warmup_steps))
