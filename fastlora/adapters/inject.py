"""Put adapted layers into a model that has none, and take them out again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fastlora.adapters.config import AdapterConfig, LoRAConfig
from fastlora.adapters.groups import find_groups, partners
from fastlora.adapters.kinds import build
from fastlora.adapters.report import Report, Row
from fastlora.adapters.starts import Taken, pissa, taken_out
from fastlora.adapters.targets import find_targets
from fastlora.adapters.view import is_peft_layer, unwrap
from fastlora.nn import AdaptedLayer, LoRALinear
from fastlora.nn.adapted_linear import AdaptedLinear
from fastlora.nn.group import InputGroup


def inject(model: nn.Module, config: AdapterConfig) -> Report:
    """Replace the layers ``config`` names by adapted ones, in place, and freeze the rest.

    The new layers hold the old ones' own weights, so this takes no memory beyond the adapters, and
    every key of the base's state dict stays. Linears that read one input (q, k and v; gate and up)
    are computed together, and have one backward: going backward through q alone, and later through
    k, takes ``retain_graph=True`` the first time.

    ``config`` is a ``LoRAConfig``, an ``AdaLoRAConfig`` or a ``VeRAConfig``. A start that takes
    its part out of the base weights (init_lora_weights="pissa") writes them once, at the end, in
    their dtype, and until then keeps copies in host memory; models that share those parameters
    change with them. ``save_adapter`` writes the difference to the weights as they were, and
    ``unload`` puts the part back.

    Returns a report of what was adapted and what was not, each with its reason.

    Raises ValueError, before anything has changed, if the configuration matches nothing, names a
    layer that cannot be adapted, or if the model carries an adapter already; for PiSSA also if a
    weight is not finite, smaller than the rank, or shared with another module.
    """
    with prepared(model, config) as plan:
        return plan.place()


class Plan:
    """Adapted layers for a model, not yet in it, and what they are to take out of its weights."""

    def __init__(self, model: nn.Module, config: AdapterConfig) -> None:
        self.placed = False
        self._model = model
        self._targets, self._skipped = find_targets(model, config)
        built = build(config, [(target.name, target.module) for target in self._targets])
        self.layers: dict[str, AdaptedLayer] = {
            target.name: layer for target, layer in zip(self._targets, built, strict=True)
        }
        self.starts: list[Taken] = []
        if isinstance(config, LoRAConfig) and config.pissa:
            self.starts = pissa(self.startable(), config.pissa_niter)

    def startable(self) -> dict[str, LoRALinear]:
        """The layers, all of them linears whose weights may change.

        Raises ValueError for a layer of another kind, and for a weight that is not one linear's.
        """
        owners: dict[int, set[str]] = {}
        for name, module in self._model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    owners.setdefault(id(parameter), set()).add(name or "the model itself")
        found = {}
        for name, layer in self.layers.items():
            if not isinstance(layer, LoRALinear):
                raise ValueError(f"{name} is no linear, and only linears can be started so")
            if tied := owners[id(layer.weight)] - {name}:
                raise ValueError(
                    f"{name} shares its weight with {', '.join(sorted(tied))}, which would change "
                    "with it; exclude it by exclude_modules"
                )
            found[name] = layer
        return found

    def place(self) -> Report:
        """Put the layers into the model and freeze the rest."""
        self._model.requires_grad_(False)
        with taken_out(self.starts):
            try:
                for target in self._targets:
                    for parent, attribute in target.places:
                        setattr(parent, attribute, self.layers[target.name])
                self.placed = True
            except BaseException:
                for target in self._targets:
                    for parent, attribute in target.places:
                        setattr(parent, attribute, target.module)
                raise
        together = self._group()
        report = Report(skipped=self._skipped)
        for name, layer in self.layers.items():
            detail = f"{layer.summary()}, {layer.weight.dtype}{together.get(name, '')}"
            report.fused.append(Row(name, detail))
        return report

    def _group(self) -> dict[str, str]:
        """Groups the layers; returns what the report says of each grouped one."""
        said = {}
        linears = {n: layer for n, layer in self.layers.items() if isinstance(layer, AdaptedLinear)}
        for members in find_groups(linears):
            group = InputGroup.of(list(members.values()))
            for slot, (name, layer) in enumerate(members.items()):
                layer.group, layer.slot = group, slot
                said[name] = f", {partners(name, members)}"
        return said


@contextmanager
def prepared(model: nn.Module, config: AdapterConfig) -> Iterator[Plan]:
    """A plan to place or to leave: unless it is placed, nothing of the model has changed after.

    Raises as ``inject`` does.
    """
    model = unwrap(model)
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLayer):
            raise ValueError(f"the model has an adapter already (at {name}); one a model")
        if is_peft_layer(module):
            raise ValueError(
                f"the model has a peft adapter already (at {name}); use fastlora.accelerate"
            )
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    plan = None
    try:
        plan = Plan(model, config)
        yield plan
    finally:
        if plan is None or not plan.placed:
            for parameter, trained in before:
                parameter.requires_grad_(trained)


def unload(model: nn.Module) -> None:
    """Put plain layers back, in place: merged weights stay merged, adapters that are not merged
    are dropped, and what PiSSA or LoRA-GA had taken out of a weight for them returns into it, which
    is then to within a rounding what it was.

    Raises ValueError if the model has no adapter of ours, or is itself an adapted layer.
    """
    model = unwrap(model)
    if isinstance(model, AdaptedLayer):
        raise ValueError(
            "the model is itself an adapted layer, which cannot be replaced inside itself; use its "
            "put_back (unless it is merged) and plain"
        )
    replaced: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, AdaptedLayer):
            continue
        if id(module) not in replaced:
            if not module.merged:
                module.put_back()
            replaced[id(module)] = module.plain()
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, replaced[id(module)])
    if not replaced:
        raise ValueError("the model has no fastlora adapter to unload")
