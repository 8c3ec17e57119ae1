"""Pairs, models and losses that are run here and by TRL, and what is kept of their gradients."""

import torch
from tiny_families import VOCABULARY, save_tiny

# our objective -> TRL's loss_type, with loss_weights
LOSSES = {
    "sigmoid": ({"beta": 0.3}, ["sigmoid"], None),
    "sigmoid and sft": ({"beta": 0.3, "sft_weight": 0.25}, ["sigmoid", "sft"], [1.0, 0.25]),
    "hinge": ({"beta": 0.3, "loss": "hinge"}, ["hinge"], None),
    "ipo": ({"beta": 0.3, "loss": "ipo"}, ["ipo"], None),
    "apo_zero": ({"beta": 0.3, "loss": "apo_zero"}, ["apo_zero"], None),
}
KINDS = ("lora", "none")
RANK = 4


def save_model(directory):
    return save_tiny("llama", directory, tie_word_embeddings=False)


def make_pairs():
    """Prompt, chosen and rejected ids of different lengths."""
    generator = torch.Generator().manual_seed(3)

    def ids(length):
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    return [(ids(p), ids(c), ids(r)) for p, c, r in [(4, 5, 9), (7, 8, 3), (2, 1, 6), (5, 13, 11)]]


@torch.no_grad()
def move(kind, named_parameters):
    """Away from the reference, equally far here and there."""
    for number, (_, parameter) in enumerate(sorted(named_parameters, key=lambda item: item[0])):
        wave = torch.cos(0.37 * torch.arange(parameter.numel()) + number).view(parameter.shape)
        if kind == "lora":
            parameter.copy_(0.1 * wave)
        else:
            parameter.add_(0.02 * wave)


def probe(gradient):
    """Three numbers that two different gradients do not share: its norm and two projections."""
    flat = gradient.detach().double().flatten()
    angles = torch.arange(len(flat), dtype=torch.float64)
    parts = (flat.norm(), flat @ torch.cos(angles), flat @ torch.sin(1.7 * angles))
    return [part.item() for part in parts]


# our objective -> further arguments of TRL's KTOConfig
KTO_LOSSES = {
    "kto": ({"beta": 0.3}, {"loss_type": "kto"}),
    "kto, weighted": (
        {"beta": 0.2, "desirable_weight": 1.5, "undesirable_weight": 0.7},
        {"loss_type": "kto", "desirable_weight": 1.5, "undesirable_weight": 0.7},
    ),
    "apo_zero": ({"beta": 0.3, "loss": "apo_zero"}, {"loss_type": "apo_zero_unpaired"}),
}
LABELS = (True, False, False, True)


def make_answers():
    """Prompt and answer ids, and a label: both sides of the pairs by turns."""
    pairs = zip(make_pairs(), LABELS, strict=True)
    return [(p, c if label else r, label) for (p, c, r), label in pairs]
