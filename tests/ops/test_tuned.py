"""Tables of measured choices: read, looked up, refused; and what is chosen without one."""

import json
import warnings

import pytest
import torch

import fastlora
from fastlora.ops import backend, tuned
from fastlora.ops.adapter_linear import tiles
from fastlora.ops.adapter_linear.contract import BACKENDS
from fastlora.ops.weight_norm import tiles as weight_norm_tiles

DEVICE = "NVIDIA H200 (test)"
CPU = torch.device("cpu")


def entry(operation="adapter_linear", what="forward", dtype="bfloat16", take="fused", **sizes):
    own = {"M": 8192, "N": 4096, "K": 4096, "r": 16} | sizes
    return tuned.Entry(operation, what, dtype, tuple(own.values()), take)


def choice(what="forward", dtype="bfloat16", device=DEVICE, **sizes):
    own = {"M": 8192, "N": 4096, "K": 4096, "r": 16} | sizes
    return tuned.choice(device, "adapter_linear", what, dtype, tuple(own.values()))


def test_the_file_name_of_a_device():
    assert tuned.device_file("NVIDIA H200") == "nvidia-h200.json"
    assert tuned.device_file("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb.json"
    assert tuned.device_file("../../etc/passwd") == "etc-passwd.json"


def test_an_entry_serves_what_is_near(tables):
    assert choice() is None
    tables.write(DEVICE, entry())
    assert choice() == choice(M=5000) == choice(M=16384, N=8192, r=32) == "fused"
    assert choice(M=32768) is choice(N=1024) is choice(what="dx") is None
    assert choice(dtype="float16") is choice(device="another card") is None


def test_the_nearest_entry_wins(tables):
    tables.write(DEVICE, entry(), entry(M=16384, take="accumulate"), entry(take="accumulate"))
    assert choice() == "fused"
    assert choice(M=16384) == "accumulate"


def test_a_table_comes_back_as_it_was_written(tables):
    tile = (("BLOCK_M", 64), ("BLOCK_N", 128))
    written = (entry(), entry(what="tile main", take=tile))
    tables.write(DEVICE, *written)
    assert tuned.entries(DEVICE, tables.folder) == written
    assert choice(what="tile main") == {"BLOCK_M": 64, "BLOCK_N": 128}


def changed(**changes):
    return json.dumps(tuned.table(DEVICE, {}, [entry()]) | changes)


def item(**changes):
    return changed(entries=[tuned.as_data(entry()) | changes])


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not JSON"),
        ("[]", "'format' must be"),
        (changed(format="fastlora.tuned/9"), "must be 'fastlora.tuned/1', not 'fastlora.tuned/9'"),
        (changed(device="NVIDIA A100"), "measured on 'NVIDIA A100'"),
        (changed(entries={}), "'entries' must be a list"),
        (changed(entries=["fused"]), r"entries\[0\] must be an object with exactly the keys op"),
        (item(speed=2), r"entries\[0\] must be an object with exactly"),
        (item(what=3), "'what' must be a name"),
        (item(dtype="int8"), "'dtype' is 'int8'"),
        (item(M=0), "'M' must be a positive integer, not 0"),
        (item(K=4096.0), "'K' must be a positive integer"),
        (item(r=True), "'r' must be a positive integer"),
        (item(take=["fused"]), "'take' must be a name or a tile's numbers"),
        (item(take={"BLOCK_M": "big"}), "'take' must be a name or a tile's numbers"),
    ],
)
def test_a_broken_table_is_said_once_and_not_used(tables, text, message):
    tables.put(DEVICE, text)
    with pytest.raises(ValueError, match=message):
        tuned.read(tables.folder / tuned.device_file(DEVICE), DEVICE)
    with pytest.warns(tuned.TableWarning, match=message):
        assert choice() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice() is None
    # and the choice is that without a table
    arch = tiles.arch_of(90, 132, DEVICE)
    assert tiles.algorithm("dx", torch.bfloat16, 8192, 4096, 4096, 16, arch) == "accumulate"


def test_a_measured_backend_is_taken(tables):
    """On the processor at hand; where it cannot run, or another is asked for, it is not."""
    device = backend.device_name(CPU)
    own = dict(what="backend", dtype="float32", M=1, N=1, K=1, r=1)
    tables.write(device, entry(**own, take="eager"))
    assert backend.choose("adapter_linear", BACKENDS, CPU, torch.float32).name == "eager"
    shown = fastlora.explain("adapter_linear", torch.ones(1))
    assert "-> eager   can run, and is taken: measured to be the fastest on this device" in shown
    assert shown.count("->") == 1
    assert backend.choose("adapter_linear", BACKENDS, CPU, torch.float64).name == "eager"
    asked = backend.choose("adapter_linear", BACKENDS, CPU, torch.float32, "onednn")
    assert asked.name == "onednn"
    tables.write(device, entry(**(own | {"dtype": "float64"}), take="onednn"))
    assert backend.choose("adapter_linear", BACKENDS, CPU, torch.float64).name == "eager"


def test_a_processor_has_a_name():
    assert backend.device_name(CPU)
    assert backend.device_name(torch.device("meta")) == "meta"


def test_weight_norm_takes_a_measured_tile(tables):
    arch = tiles.arch_of(90, 132, DEVICE)
    first, second, *_ = weight_norm_tiles.candidates("rows", torch.bfloat16, arch)
    take = tuple(vars(second).items())
    tables.write(DEVICE, entry("weight_norm", "tile rows", M=1, N=1, K=1, take=take))
    assert weight_norm_tiles.choose("rows", torch.bfloat16, 16, arch) == second
    assert weight_norm_tiles.choose("rows", torch.bfloat16, 4, arch) == first


def test_choosing_does_not_look_at_the_file_again(tables, monkeypatch):
    tables.write(DEVICE, entry())
    arch = tiles.arch_of(90, 132, DEVICE)
    call = (torch.bfloat16, 8192, 4096, 4096, 16, arch)
    assert tiles.algorithm("forward", *call) == "fused"
    monkeypatch.setattr(tuned, "choice", None)  # whoever asked would fail
    assert tiles.algorithm("forward", *call) == "fused"


def test_shipped_tables_are_sound():
    """Each is in the file of its device, and its tiles are candidates."""
    for path in tuned.TABLES.glob("*.json"):
        device = json.loads(path.read_text())["device"]
        assert tuned.device_file(device) == path.name
        assert tuned.read(path, device)
