"""One optimizer for weights of all shapes: matrices by Muon, everything else by AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.95)


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024; torch's) for matrices, AdamW for vectors and for experts in one tensor.

    Muon's steps are scaled to the size of AdamW's (arXiv 2502.16982), so that one learning rate serves both. Together
    they are one optimizer, which Lightning's automatic optimization, schedules and checkpoints want.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float = 0.0):
        found = list(parameters)
        matrices, others = ([p for p in found if (p.dim() == 2) == square] for square in (True, False))
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(
                torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            )
        if others:
            self._parts.append(torch.optim.AdamW(others, lr=lr, betas=BETAS, weight_decay=weight_decay))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let the parts work on the groups and the state that this optimizer shows, saves and loads."""
        groups = iter(self.param_groups)
        for part in self._parts:
            part.param_groups, part.state = list(islice(groups, len(part.param_groups))), self.state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss
