"""The family's methods for tests: our configuration and peft's, and a model of all kinds."""

import torch
from torch import nn

from fastlora import AdaLoRAConfig, LoRAConfig, VeRAConfig

IDS = torch.arange(24).view(2, 12) % 96
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# name → (our configuration's options, peft's where they differ); peft's take target_modules too
LORA = {
    "lora": ({"r": 4, "lora_alpha": 7}, {}),
    "rslora": ({"r": 4, "lora_alpha": 7, "use_rslora": True}, {}),
    "dora": ({"r": 4, "lora_alpha": 7, "use_dora": True}, {}),
    "dora_again": ({"r": 4, "lora_alpha": 7, "use_dora": True, "dora_keep_output": False}, {}),
    "lora_bias": ({"r": 4, "lora_alpha": 7, "lora_bias": True}, {}),
    "dora_patterns": (
        {
            "r": 4,
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 9, "layers.1.mlp.up_proj": 2, "first": 2},
            "alpha_pattern": {"k_proj": 3, "second": 5},
        },
        {},
    ),
}
OTHERS = {
    "vera": ({"r": 24, "projection_prng_key": 3, "d_initial": 0.2}, {}),
    "vera_from_key": ({"r": 5, "save_projection": False}, {}),
    "adalora": ({"init_r": 5, "target_r": 3, "lora_alpha": 7, "total_step": 9}, {}),
}
METHODS = LORA | OTHERS
ONLY_OURS = {"dora_keep_output"}  # what is kept for backward, not what is computed


def ours(method, targets, **more):
    kind = {"vera": VeRAConfig, "adal": AdaLoRAConfig}.get(method[:4], LoRAConfig)
    options = {"target_modules": targets} | METHODS[method][0] | more
    return kind(**_without_strays(options, targets))


def peft_config(method, targets, **more):
    import peft

    own, other = METHODS[method]
    kind = {"vera": peft.VeraConfig, "adal": peft.AdaLoraConfig}.get(method[:4], peft.LoraConfig)
    options = {"target_modules": targets} | own | other | more
    options = {name: value for name, value in options.items() if name not in ONLY_OURS}
    return kind(**_without_strays(options, targets))


def _without_strays(options, targets):
    """Patterns only for modules that are adapted, as ours insists on."""
    for name in ("rank_pattern", "alpha_pattern"):
        if isinstance(options.get(name), dict):
            kept = {k: v for k, v in options[name].items() if k.rpartition(".")[2] in targets}
            options = options | {name: kept}
    return options


def randomise(tensors, seed=1):
    """Moves an adapter away from where it starts; ``tensors`` are its parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors:
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.add_(0.1 * noise.to(tensor.dtype))


class Sorts(nn.Module):
    """One of each layer: embedding, convolutions, linears that share an input or do not."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 12, padding_idx=0)
        self.first = nn.Conv1d(12, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, (3, 2), stride=(1, 2), padding=1, bias=False)
        self.third = nn.Conv3d(6, 6, (1, 3, 1), padding=(0, 1, 0))
        self.q_proj = nn.Linear(6, 10)
        self.k_proj = nn.Linear(6, 7, bias=False)
        self.out = nn.Linear(17, 5)

    def forward(self, ids):
        h = self.first(self.words(ids).transpose(1, 2))
        h = self.second(h[..., None].expand(-1, -1, -1, 4))
        h = self.third(h[:, :, None]).mean((2, 4)).transpose(1, 2)
        return self.out(torch.cat((self.q_proj(h), self.k_proj(h)), -1))


SORTS = ["words", "first", "second", "third", "q_proj", "k_proj", "out"]
SORTS_IDS = torch.tensor([[1, 2, 0, 5, 3], [10, 3, 3, 0, 7]])


def sorts(dtype=torch.float32):
    torch.manual_seed(0)
    return Sorts().to(dtype)
