"""FrozenLMStage: a LightningModule around a language model that it must never train, save or move by accident."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gprune.errors import UserError
from gprune.models.blocks import decoder_layers
from gprune.models.loading import without_weights
from gprune.models.offload import stored


class FrozenLMStage(L.LightningModule):
    """Holds the language model beside the module, not inside it.

    The model sits in a tuple, which `nn.Module` does not register as a child. So checkpoints hold the learned
    tensors only, DDP neither broadcasts nor reduces hundreds of millions of frozen parameters, and `train()` does
    not wake the model's dropout. The price: Lightning does not move it, hence the two hooks.

    With `shard`, and two or more processes, the stage runs a copy of the model whose layers are spread over all of
    them. Lightning's own FSDP does not see the model either, and would shard the thresholds only.
    """

    purpose = "this stage"  # what it does, for errors

    def __init__(self, model: PreTrainedModel, *, shard: bool = False):
        super().__init__()
        assert not any(p.requires_grad for p in model.parameters()), "the language model must be frozen"
        self._frozen = (model,)
        self._shard = shard
        self._spread: tuple[PreTrainedModel, ...] = ()

    @property
    def lm(self) -> PreTrainedModel:
        """The language model, or its sharded copy while there is one."""
        return (*self._spread, *self._frozen)[0]

    def setup(self, stage: str) -> None:
        device = self.trainer.strategy.root_device
        if self._shard and self.trainer.world_size > 1:
            self._spread = (spread(self._frozen[0], device, self.trainer.world_size),)
        # An offloaded or sharded model has a place for every layer already.
        elif not self._shard and getattr(self.lm, "hf_device_map", None) is None:
            self.lm.to(device)

    def teardown(self, stage: str) -> None:
        self._spread = ()
        if not self._shard:
            # Lightning has moved to the CPU what a stage has registered: of a model that learns, some weights alone.
            self.to(self.trainer.strategy.root_device, non_blocking=True)

    def batch_loss(self, losses: Tensor, weight: Tensor, name: str) -> Tensor:
        """The loss of a step from the losses of its windows, logged under `name` as the mean of the global batch.

        Args:
            losses: (B,) float32, nats per token.
            weight: (B,), 0 for a window that only fills up a process's share.
            name: such as `learn/loss`.

        Returns:
            () float32, whose mean over processes is the mean over the global batch, whatever each process's share.
        """
        total = self.trainer.strategy.reduce(weight.sum(), reduce_op="sum")
        loss = (losses * (weight * self.trainer.world_size / total).to(losses)).sum()
        value = self.trainer.strategy.reduce(loss.detach(), reduce_op="mean")
        require_finite(float(value), f"The loss of {self.purpose}")
        self.log(name, value, prog_bar=True)
        return loss


@torch.no_grad()
def spread(model: PreTrainedModel, device: torch.device, processes: int) -> PreTrainedModel:
    """A copy of a frozen model whose decoder layers are sharded over all processes: PyTorch's `fully_shard`.

    Each process holds its part of every layer, and a layer is gathered while it computes, forward and backward.
    Embeddings, final norm and head are on every process. All processes have to call this function, and to run the copy
    equally often.

    Args:
        model: the same in the memory of each process, pruned or not; or offloaded, and loaded from a folder.
        device: of this process.
        processes: how many there are.
    """
    # Imported here, because not every build of torch has them.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes,))
    copied = without_weights(model).eval()
    layers = list(decoder_layers(copied))
    inside = {id(module) for layer in layers for module in layer.modules()}
    paths = {id(module): path for path, module in copied.named_modules()}
    for module in copied.modules():
        if id(module) not in inside:
            _fill(module, model.get_submodule(paths[id(module)]), device)
    for layer in layers:  # one at a time, so that no process holds all of them
        for module in layer.modules():
            _fill(module, model.get_submodule(paths[id(module)]), device)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    copied.tie_weights()
    # Hooks that count the model's tokens count the copy's too.
    ours, theirs = copied.get_decoder(), model.get_decoder()
    for hooks in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        setattr(ours, hooks, getattr(theirs, hooks))
    return copied.requires_grad_(False)


def _fill(module: nn.Module, source: nn.Module, device: torch.device) -> None:
    """Copy the parameters and buffers of another module to a module without weights."""
    for name, _ in list(module.named_parameters(recurse=False)):
        value = stored(source, name).detach().to(device, copy=True)
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    for name, buffer in source.named_buffers(recurse=False):
        module._buffers[name] = buffer.to(device, copy=True)


def require_finite(value: float, what: str) -> None:
    """Raise a UserError for NaN or infinity, so that no mean hides it."""
    if not abs(value) < float("inf"):
        raise UserError(
            f"{what} is {value}; expected a finite number. Lower the learning rate, or use --model.dtype float32."
        )
