"""Time of one mixer with a state, forward and backward, over packed documents: each by itself, as
without flash-linear-attention and with it, all of them as one row, and rows of single documents.

    python tests/benchmarks/state_rates.py [FAMILY ...]

A process for each family with that package, and one without. A JSON line each, in milliseconds,
how far one row is from documents alone, and a table.
"""

import argparse
import json
import subprocess
import sys
import time
from statistics import median

if "--plain" in sys.argv:
    sys.modules["fla"] = None  # type: ignore[assignment]  # as where it is not installed

import torch
from report import print_table
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from headrace.trainer.architecture.families_state import STATE_LAYERS, mixer_of
from headrace.trainer.layers.documents import Documents, find_documents
from headrace.trainer.layers.state_mixers import restart_at_documents, take_one_row

ROW, ROWS, REPEATS = 4096, 2, 10
PACKED = [900, 60, 512, 300, 28, 1200, 96, 400, 600]  # of one row, 455 on average
SMALL = {
    "num_hidden_layers": 1,
    "vocab_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
KINDS = {
    "lfm2": {**SMALL, "layer_types": ["conv"]},
    "qwen3_5_text": {**SMALL, "layer_types": ["linear_attention"]},
    "qwen3_next": {**SMALL, "layer_types": ["linear_attention"]},
    "kimi_linear": {**SMALL, "layer_types": ["linear_attention"], "mlp_layer_types": ["dense"]},
    "mamba2": SMALL,
}


def mixer_for(family: str, device: torch.device) -> nn.Module:
    """Return the mixer of a layer of the sizes of transformers' defaults."""
    known = CONFIG_MAPPING[family]().to_dict()
    config = CONFIG_MAPPING[family](**{k: v for k, v in KINDS[family].items() if k in known})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device)
    mixer = mixer_of(model.base_model.layers[0], STATE_LAYERS[family])
    restart_at_documents(mixer)
    return mixer


def run(mixer: nn.Module, hidden: Tensor, documents: Documents) -> Tensor:
    """Mix and go back; returns the gradient of the input."""
    states = hidden.detach().requires_grad_()
    mixer(states, attention_mask=documents).float().square().mean().backward()
    assert states.grad is not None
    return states.grad


def milliseconds(mixer: nn.Module, hidden: Tensor, documents: Documents) -> float:
    """Return the median time of a pass."""
    times = []
    for _ in range(REPEATS):
        wait(hidden)
        start = time.perf_counter()
        run(mixer, hidden, documents)
        wait(hidden)
        times.append(1000 * (time.perf_counter() - start))
    return median(times[REPEATS // 3 :])


def wait(hidden: Tensor) -> None:
    if hidden.is_cuda:
        torch.cuda.synchronize()


def measure(family: str, device: torch.device) -> dict[str, object]:
    """Return the times of one family."""
    mixer = mixer_for(family, device)
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, ROW, mixer.hidden_size if hasattr(mixer, "hidden_size") else 2560)
    hidden = hidden.to(device, torch.bfloat16)
    packed = find_documents([PACKED] * ROWS, [ROW] * ROWS, device)
    single = find_documents([[ROW]] * ROWS, [ROW] * ROWS, device)
    found: dict[str, object] = {
        "family": family,
        "by_document": milliseconds(mixer, hidden, packed),
    }
    alone = run(mixer, hidden, packed)
    take_one_row(mixer, STATE_LAYERS[family].one_row, device)
    if getattr(mixer, "one_row", None) is not None:
        found["one_row"] = milliseconds(mixer, hidden, packed)
        found["apart"] = float((run(mixer, hidden, packed) - alone).norm() / alone.norm())
    return found | {"single_documents": milliseconds(mixer, hidden, single)}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", help=f"of {', '.join(KINDS)}; default: all")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def in_a_process(family: str, *options: str) -> dict[str, float]:
    """Measure one family in a process of its own."""
    command = [sys.executable, __file__, family, "--one", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    print(done.stdout.splitlines()[-1], flush=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure families, or be one of the processes that do."""
    options = parse_arguments()
    if options.one:
        place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        print(json.dumps(measure(options.families[0], place)), flush=True)
        return
    rows = []
    known = [family for family in KINDS if family in CONFIG_MAPPING]  # older transformers
    for family in options.families or known:
        plain, found = in_a_process(family, "--plain"), in_a_process(family)
        times = [plain["by_document"], found["by_document"], found.get("one_row")]
        cells = ["" if time is None else f"{time:.1f}" for time in times]
        ratio = f"{times[0] / times[2]:.1f}" if times[0] and times[2] else ""
        rows.append([family, *cells, ratio, f"{found.get('apart', 0.0):.1e}"])
    columns = ["", "by document, ms", "the same, with kernels", "one row", "times", "apart"]
    print_table("packed documents through one mixer", columns, rows)


if __name__ == "__main__":
    main()
