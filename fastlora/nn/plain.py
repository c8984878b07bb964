"""Whether a module may be bypassed: calling it does its class's forward and nothing more."""

from __future__ import annotations

from torch import nn


def added_behaviour(module: nn.Module) -> str | None:
    """What a call of ``module`` does beyond its class's forward, as a sentence; None if nothing."""
    if "forward" in module.__dict__:
        return "its forward has been replaced on the instance"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "it carries hooks"
    return None
