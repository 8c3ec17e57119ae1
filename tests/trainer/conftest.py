"""A tiny Llama with its own tokenizer, shards of real text for it, and ways to train on them."""

from pathlib import Path

import pytest
from runs import Training, make_pair_shards, make_shards
from tiny_llama import write_tiny_llama

WORDS = "water wheel mill river stone grain flour gate shaft gear pond sluice".split()
REAL_MODEL = Path(__file__).parents[2] / "models" / "smollm2-135m"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Return a five-layer Llama with tied embeddings and a BPE tokenizer of 384 entries."""
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def tiny_shards(tiny_model, tmp_path_factory):
    """Two sources, three shards, several row groups, rows of 64 tokens."""
    return make_shards(tiny_model, tmp_path_factory.mktemp("shards") / "tiny")


@pytest.fixture(scope="session")
def real_model():
    """SmolLM2-135M-Instruct, which `make test` fetches first."""
    assert REAL_MODEL.is_dir(), f"{REAL_MODEL} is missing; run `make model`"
    return REAL_MODEL


@pytest.fixture
def training(tiny_model, tiny_shards, tmp_path):
    """Ten steps of four rows on the tiny model, one thread a process."""
    config = tmp_path / "train.toml"
    config.write_text(
        f"""
        model = "{tiny_model}"
        output_dir = "unused"
        max_steps = 10
        gradient_accumulation_steps = 4
        threads = 1
        [[datasets]]
        path = "{tiny_shards}"
        [[evaluation_datasets]]
        path = "{tiny_shards}"
        max_rows = 9
        [adapter]
        rank = 4
        dropout = 0.1
        [optimizer]
        lr = 2e-3
        gradient_clipping = 0.5
        [scheduler]
        type = "cosine"
        warmup_steps = 2
        [reporting]
        token_statistics_every = 4
        """
    )
    return Training(tmp_path, config)


@pytest.fixture(scope="session")
def pair_shards(tiny_model, tmp_path_factory):
    """Good answers are words of mills, bad ones are refusals."""
    import numpy as np

    folder = tmp_path_factory.mktemp("pair-shards")
    generator = np.random.default_rng(0)

    def words(choice, most):
        return " ".join(generator.choice(choice, generator.integers(2, most)))

    rows = [
        {
            "prompt": f"{words(WORDS, 5)}? ",
            "chosen": f"{words(WORDS, 9)}.",
            "rejected": f"{words(['no', 'maybe', 'never'], 9)}.",
        }
        for _ in range(40)
    ]
    return make_pair_shards(tiny_model, folder, "pairs", rows, shards=2)


@pytest.fixture
def pair_training(training, tiny_shards, pair_shards):
    text = training.config.read_text().replace(str(tiny_shards), str(pair_shards))
    training.config.write_text(text)
    return training


@pytest.fixture
def one_thread():
    """One thread of torch, so that sums have one order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def layout():
    """One process."""
    from alone import layout_of_one

    with layout_of_one() as alone:
        yield alone


@pytest.fixture
def folder(tmp_path):
    """An empty folder of checkpoints, of which the last two are kept."""
    from headrace.trainer.checkpoint.checkpoint_folder import CheckpointFolder

    return CheckpointFolder(tmp_path, keep_last=2)


@pytest.fixture
def save(folder, layout):
    """Saves the state after a step; returns the path of the checkpoint."""
    from checkpoints import state, trained

    from headrace.trainer.checkpoint.saver import Saver

    def save(step):
        Saver(folder, layout, background=False).begin(state(step), *trained())
        return folder.path / f"step-{step:06d}"

    return save
