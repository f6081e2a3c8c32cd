"""Reconstruction: block by block, all matrices of what is left of a block learn to give what the dense block gives."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gprune.calibration.layerwise import Call
from gprune.config import ReconstructConfig
from gprune.console import quieted
from gprune.models.blocks import Block
from gprune.models.offload import device_of
from gprune.recovery.contract import Material
from gprune.recovery.prefix import PrunedPrefix
from gprune.stages.base import require_finite
from gprune.stages.distillation import BETAS, parameters_of


class ReconstructionStage(L.LightningModule):
    """One pruned block learns, on the pruned stream x, to leave what the dense block leaves on the dense one, y*.

    Loss: mean over tokens of ||y_t - y*_t||^2 / ||y*_t - x_t||^2: the error of each token over the energy of what the
    block has to add to it. With `weigh="corpora"` both are summed over a corpus first, so that its loud tokens weigh
    more. AdamW, its step size falling to 0. Only the weights of `parameters` are registered.

    Args:
        block: pruned, in memory.
        index: of the dense block in the model, for its other arguments.
        calls: the text; `hidden` of each is y*, (B, T, H).
        hidden: x of each call, (B, T, H).
        corpora: of each call.
        attention: let the attention learn too.
    """

    def __init__(
        self, block: Block, index: int, calls: list[Call], hidden: list[Tensor], corpora: list[int],
        settings: ReconstructConfig, *, attention: bool,
    ):  # fmt: skip
        super().__init__()
        self.settings, self.index = settings, index
        self._layer, self._text = (block.layer,), (calls, hidden, corpora)
        found = parameters_of(block, "all" if attention else "ffn")
        self.learned = nn.ParameterDict({name.replace(".", "_"): p for name, p in found})
        self.energy = {c: self._energy(c) for c in set(corpora)} if settings.weigh == "corpora" else {}

    def _energy(self, corpus: int) -> float:
        """Mean over a corpus' tokens of ||y* - x||^2."""
        calls, hidden, corpora = self._text
        found = [
            (call.hidden.float() - x.float()).square().sum(-1).mean()
            for call, x, c in zip(calls, hidden, corpora, strict=True)
            if c == corpus
        ]
        return float(torch.stack(found).mean())

    def configure_optimizers(self) -> dict[str, Any]:
        s = self.settings
        optimizer = torch.optim.AdamW(self.learned.values(), lr=s.learning_rate, betas=BETAS, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(
            optimizer, 1.0, 0.0, total_iters=self.trainer.estimated_stepping_batches
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> DataLoader:
        order = torch.Generator().manual_seed(self.index)
        return DataLoader(range(len(self._text[0])), batch_size=None, shuffle=True, generator=order)

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        require_finite(float(loss.detach()), f"The loss of reconstruction in block {self.index}")
        return loss

    def loss(self, place: int) -> Tensor:
        """Of one call, () float32."""
        calls, hidden, corpora = self._text
        y = calls[place].through(self._layer[0], self.index, hidden[place])
        wanted, x = calls[place].hidden.to(y.device).float(), hidden[place].to(y.device).float()
        error = (y.float() - wanted).square().sum(-1)
        if self.energy:
            return error.mean() / self.energy[corpora[place]]
        return (error / (wanted - x).square().sum(-1).clamp_min(1e-12)).mean()

    @torch.no_grad()
    def mean_loss(self) -> float:
        return float(torch.stack([self.loss(place) for place in range(len(self._text[0]))]).mean())


class ReconstructedPrefix(PrunedPrefix):
    """`PrunedPrefix`, in which a block learns when its projections are solved, before the text goes through it."""

    def __init__(self, material: Material, settings: ReconstructConfig):
        super().__init__(material.dense, material.masks, material.batches, ridge=material.ridge)
        self.settings = settings
        counts = [-(-len(windows.tokens) // material.batch_size) for windows in material.text]
        self.corpora = [corpus for corpus, count in enumerate(counts) for _ in range(count)]
        self.errors: list[tuple[float, float]] = []  # before and after, by block

    def polish(self, block: Block, index: int) -> None:
        if not self.lost[index]:
            return
        dtypes = {name: p.dtype for name, p in block.layer.named_parameters()}
        block.layer.float()
        hidden = [x.float() for x in self.hidden]
        stage = ReconstructionStage(
            block, index, self.walk.calls, hidden, self.corpora, self.settings, attention="output" in self.lost[index]
        )
        before, device = stage.mean_loss(), device_of(block.layer)
        for parameter in stage.learned.values():
            parameter.requires_grad_()
        with quieted("lightning.pytorch.utilities.rank_zero"):  # it says what devices there are, each time
            trainer = L.Trainer(
                max_epochs=self.settings.passes, accelerator="gpu" if device.type == "cuda" else "cpu", devices=1,
                strategy=SingleDeviceStrategy(device),  # which need not be the first one
                logger=False, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False, gradient_clip_val=1.0,
            )  # fmt: skip
            with torch.enable_grad():
                trainer.fit(stage)
        for name, parameter in block.layer.named_parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
            parameter.data = parameter.data.to(dtypes[name])
        self.errors.append((before, stage.mean_loss()))
