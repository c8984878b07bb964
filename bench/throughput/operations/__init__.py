"""What can be timed: a file per operation, each with its OPERATION."""

from bench.throughput.operations import (
    adapter_group,
    adapter_linear,
    dora,
    sign_momentum,
    svd_lowrank,
    svd_product,
    weight_norm,
)

OPERATIONS = {
    module.OPERATION.name: module.OPERATION
    for module in (
        adapter_linear,
        adapter_group,
        dora,
        weight_norm,
        svd_lowrank,
        svd_product,
        sign_momentum,
    )
}

__all__ = ["OPERATIONS"]
