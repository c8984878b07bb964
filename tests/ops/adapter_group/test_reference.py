"""The specification itself against finite differences, and against adapter_linear's."""

import torch

from fastlora.ops.adapter_group.reference import adapter_group_reference
from fastlora.ops.adapter_linear.reference import adapter_linear_reference
from fastlora.ops.dropout import keep_scale
from tests.ops.adapter_group.cases import TENSORS, group, masks, trained
from tests.ops.adapter_linear.cases import VECTORS

KINDS = (
    {"n": 3, "r": 2, "bias": True},
    {"n": 4, "r": 1, "p": 0.4, "scaling": -1.5},
    {"n": 3, "r": 2, "which": VECTORS, "bias": True, "p": 0.3},
)


def test_gradients():
    x, members = group(*KINDS, leading=(2, 2), k=5, dtype=torch.float64)
    members[2] = members[2]._replace(drop_base=True)
    keeps = masks(x, members)
    x, members = trained(x, members)
    leaves = [x, *(getattr(m, n) for m in members for n in TENSORS if getattr(m, n) is not None)]

    def call(x, *given):
        rest = iter(given)
        own = [
            m._replace(**{n: next(rest) for n in TENSORS if getattr(m, n) is not None})
            for m in members
        ]
        return adapter_group_reference(x, own, keeps)

    assert torch.autograd.gradcheck(call, leaves)


def test_each_result_is_the_layers_own():
    x, members = group(*KINDS, dtype=torch.float64)
    keeps = masks(x, members)
    for y, m, keep in zip(adapter_group_reference(x, members, keeps), members, keeps, strict=True):
        expected = adapter_linear_reference(
            x, *m[:5], keep, keep_scale(m.dropout_p), *m[6:10]
        )  # fmt: skip
        assert torch.equal(y, expected)
