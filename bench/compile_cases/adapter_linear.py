"""The kernels of ``adapter_linear``, which ``adapter_group`` launches too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from bench.compile_cases.case import Case, Flags, alignments, area
from fastlora.ops.adapter_linear import tiles

KERNELS = tiles.KERNELS

_X_A = ("stride_xk", "stride_ak")
_FORWARD = ("stride_xk", "stride_wk", "stride_tr", "stride_br", "stride_on", "stride_bias")
_DX = ("stride_xk", "stride_wn", "stride_tr", "stride_bn", "stride_on")
_DY = ("stride_dyn", "stride_br", "stride_tr")
_B_T = ("stride_bn", "stride_tm")
_H_X = ("stride_hr", "stride_xk")
_DY_X_W = ("stride_dyn", "stride_xk", "stride_wk")
_NO_SCALE = ("scale_ptr",)
_NO_BIAS = ("bias_ptr",)
_NO_PRODUCT = ("x_ptr", "w_ptr", "bias_ptr", *_NO_SCALE)
_NO_DOTS = (
    *("y_ptr", "bias_ptr", "dots_ptr", "squares_ptr"),
    *("stride_ym", "stride_yn", "stride_bias"),
)

FUNCTIONS = {
    "shrink": "adapter_linear_fwd_shrink_kernel",
    "main": "adapter_linear_main_kernel",
    "seed": "adapter_linear_main_kernel",
    "bwd_dy": "adapter_linear_bwd_dy_kernel",
    "bwd_da": "adapter_linear_bwd_da_kernel",
    "main_scaled": "adapter_linear_main_kernel",
    "bwd_dots": "adapter_linear_bwd_dy_kernel",
    "bwd_dg": "adapter_linear_bwd_dg_kernel",
    "drop": "adapter_linear_drop_kernel",
    "sum": "adapter_linear_sum_kernel",
}

# the flags that change registers or shared memory, the heaviest first; EVEN_K follows the alignment
FLAGS = {
    "shrink": (
        Flags("dropout", {"DROPOUT": True}, (), _X_A),
        Flags("plain", {"DROPOUT": False}, ("seed_ptr",), _X_A),
    ),
    "main": (
        Flags("dx dropout", {"DROPOUT": True}, (*_NO_BIAS, *_NO_SCALE), _DX, ("stride_tm",)),
        Flags(
            "forward bias",
            {"HAS_BIAS": True},
            ("seed_ptr", *_NO_SCALE),
            _FORWARD,
            ("stride_tm", "stride_bn"),
        ),
        Flags("dx", {}, ("seed_ptr", *_NO_BIAS, *_NO_SCALE), _DX, ("stride_tm",)),
    ),
    "main_scaled": (
        Flags("dx dropout", {"DROPOUT": True, "SCALE_IN": True}, _NO_BIAS, _DX, ("stride_tm",)),
        Flags(
            "forward bias",
            {"HAS_BIAS": True, "SCALE_OUT": True},
            ("seed_ptr",),
            _FORWARD,
            ("stride_tm", "stride_bn"),
        ),
        Flags("dx", {"SCALE_IN": True}, ("seed_ptr", *_NO_BIAS), _DX, ("stride_tm",)),
    ),
    "seed": (Flags("dx dropout", {"DROPOUT": True}, _NO_PRODUCT, _DX, ("stride_tm",)),),
    "bwd_dy": (
        Flags("h db", {"NEED_H": True, "NEED_DB": True}, _NO_DOTS, _DY, _B_T),
        Flags("h", {"NEED_H": True}, ("t_ptr", "db_ptr", *_NO_DOTS), _DY, _B_T),
    ),
    "bwd_da": (
        Flags("dropout", {"DROPOUT": True}, (), _H_X, ("stride_hm",)),
        Flags("plain", {}, ("seed_ptr",), _H_X, ("stride_hm",)),
    ),
    "bwd_dots": (
        Flags(
            "h db dots",
            {"NEED_H": True, "NEED_DB": True, "NEED_DOTS": True, "HAS_BIAS": True},
            (),
            (*_DY, "stride_yn", "stride_bias"),
            _B_T,
        ),
    ),
    "bwd_dg": (Flags("dg", {}, (), _DY_X_W),),
    "drop": (Flags("drop", {}, (), ("stride_xk",)),),
    "sum": (Flags("sum", {}, (), ()),),
}

_NO_MATRICES = ("sum", "drop")  # what multiplies none, and needs no tensor core

# element types other than the compute dtype: the sums and what is summed are fp32
_POINTERS = {"seed_ptr": "i64", "asked_ptr": "i1"} | dict.fromkeys(
    (
        *("h_ptr", "db_ptr", "da_ptr", "dg_ptr", "dots_ptr", "squares_ptr", "scale_ptr"),
        "parts_ptr",
    ),
    "fp32",
)


def cases(kernel: str, dtype: str, arch: int, reduced: bool) -> Iterator[Case]:
    """Every tile in every variant; reduced, the largest in the heaviest."""
    facts = tiles.arch_of(arch, sm_count=128)
    if kernel in _NO_MATRICES and dtype == "tfloat32":
        return
    element = getattr(torch, dtype.removeprefix("t"))
    slots = tiles.slots(kernel, element, facts)

    def case(tile: Any, flags: Flags, alignment: str, unaligned: tuple[str, ...]) -> Case:
        pointers = _POINTERS
        if kernel == "bwd_da":  # H comes in as bwd_dy has stored it
            pointers = {name: own for name, own in pointers.items() if name != "h_ptr"}
        return Case(
            kernel,
            "fastlora.ops.adapter_linear.triton",
            FUNCTIONS[kernel],
            dtype,
            arch,
            facts.shared_bytes,
            tiles.shared_bytes(kernel, tile, element, facts),
            tile,
            flags,
            alignment,
            unaligned,
            {
                "INPUT_PRECISION": "tf32" if dtype == "tfloat32" else "ieee",
                "EVEN_K": not unaligned or unaligned[0] == "R",
                "HAS_PRODUCT": kernel != "seed",
            },
            pointers,
            kernel not in _NO_MATRICES,
        )

    if reduced:
        yield case(max(slots.values(), key=area), FLAGS[kernel][0], "all 16", ())
        return
    for slot, tile in slots.items():
        for flags in FLAGS[kernel]:
            for alignment, unaligned in alignments(slot, slots, flags):
                yield case(tile, flags, alignment, unaligned)
