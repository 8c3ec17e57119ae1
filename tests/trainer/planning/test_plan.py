"""What `headrace plan` predicts."""

import functools
import json

import pytest
import torch
from built_stages import build_stage
from model_types import architecture_for
from tiny_families import COMMON, CPU, config_of, save_tiny
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from headrace.jobs import cli
from headrace.schemas.errors import ConfigError
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.architecture.read_architecture import read_architecture
from headrace.trainer.building.make_plan import make_plan
from headrace.trainer.building.self_check import plan_model
from headrace.trainer.building.self_check import save_tiny as save_tiny_type
from headrace.trainer.layers.documents import find_documents
from headrace.trainer.optim.optimizer import build_optimizer
from headrace.trainer.optim.parameter_groups import table_names
from headrace.trainer.optim.states import tensors_of
from headrace.trainer.planning.layer_activations import layer_activations, run_as_compiled
from headrace.trainer.planning.memory_model import state_bytes
from headrace.trainer.planning.plan_report import parse_size, report
from headrace.trainer.planning.remedies import more_slices, remedies
from headrace.trainer.planning.run_plan import plan_run
from headrace.trainer.planning.tiny_trials import TinyTrials

GIB = 1 << 30
TOKENS = 48
LORA = {"kind": "lora", "rank": 4}
NF4 = {"backend": "bnb", "double_quantization": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("plan") / "llama", num_hidden_layers=8)


def planned(model, stages, gpus=None, adapter=None, **settings):
    config = config_of(model, stages, adapter, gradient_accumulation_steps=8, **settings)
    return plan_once(config.model_dump_json(exclude_unset=True), gpus or stages)


def told(run, gpus, memory):
    return report(run, memory, remedies(run, gpus, memory, TinyTrials(run)))


@functools.cache
def plan_once(config, gpus):
    """Counting what a layer keeps takes seconds, and most tests count the same one."""
    settings = TrainConfig.model_validate_json(config)
    return plan_run(settings, plan_model(settings), gpus, TOKENS)


@pytest.mark.parametrize(
    ("adapter", "quantization"),
    [(None, None), (LORA, None), (LORA, NF4)],
    ids=["full", "LoRA", "QLoRA"],
)
def test_activations_are_those_that_autograd_keeps(model, adapter, quantization):
    """Counted on tensors without memory, and on the real ones of a middle stage."""
    settings = {"dtype": "float32", "micro_batch_size": 2, "quantization": quantization}
    settings |= {"kernels": "torch"}  # as it runs here
    config = config_of(model, 8, adapter, **settings)
    predicted = layer_activations(plan_model(config), config, torch.float32, TOKENS)

    stage = build_stage(config, 4, CPU).stage
    held = [*stage.parameters(), *stage.buffers()]
    weights = {tensor.untyped_storage().data_ptr() for tensor in held}
    hidden = torch.randn(2, TOKENS, COMMON["hidden_size"], requires_grad=True)
    positions = torch.arange(TOKENS).repeat(2, 1)
    mask = torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    table = stage.rotary(hidden, positions)
    shared = {t.untyped_storage().data_ptr() for t in (mask, *table)}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights | shared:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        arguments = stage.arguments_of_layer(0, mask, positions, table)
        stage.layer_functions.plain(stage.layers[0], hidden, arguments)
    assert predicted.kept_of(4, None) == sum(size for size, _ in kept.values())
    assert predicted.boundary == hidden.nbytes


def test_parameters_of_all_stages_are_those_of_the_model(model):
    whole = planned(model, 1).stages[0]
    stages = planned(model, 4).stages
    head = COMMON["vocab_size"] * COMMON["hidden_size"]
    assert sum(stage.weights for stage in stages) == whole.weights + head  # tied, held twice
    assert stages[0].layers[0].start == 0
    assert list(stages[-1].layers[-1])[-1] == 7
    assert stages[0].memory.optimizer == 8 * stages[0].trained


COUNTED = {
    "Muon": {"type": "muon"},
    "SGD": {"type": "sgd"},
    "SGD without momentum": {"type": "sgd", "momentum": 0.0},
    "Adagrad": {"type": "adagrad"},
}


def counted():
    """All weights for each optimizer; adapters for the one that tells tables apart."""
    for name, optimizer in COUNTED.items():
        few = () if name == "Muon" else pytest.mark.exhaustive
        yield pytest.param(None, optimizer, id=f"{name}-full")
        yield pytest.param(LORA, optimizer, id=f"{name}-LoRA", marks=few)


@pytest.mark.parametrize(("adapter", "optimizer"), [*counted()])
def test_states_are_counted_as_the_optimizer_makes_them(model, adapter, optimizer):
    settings = {"optimizer": {"lr": 1e-3, **optimizer}, "dtype": "float32"}
    predicted = planned(model, 2, adapter=adapter, **settings).stages
    config = config_of(model, 2, adapter, **settings)
    for stage in range(2):
        built = build_stage(config, stage, CPU)
        made = build_optimizer(config.optimizer, built.trained, tables=table_names(built))
        states = [tensors_of(made, item.parameter) for item in built.trained]
        held = sum(value.nbytes for one in states for value in one.values() if value.ndim)
        assert held == predicted[stage].memory.optimizer


def test_earlier_stages_hold_more_micro_batches(model):
    run = planned(model, 4, partition="uniform")
    held = [stage.memory.activations for stage in run.stages]
    assert held[0] == pytest.approx(4 * held[3])
    assert run.bubble == pytest.approx(3 / 11)
    assert 0 < run.efficiency < run.balance <= 1


def test_chunks_shorten_the_bubble_and_hold_more(model):
    plain = planned(model, 2, partition="uniform")
    chunks = planned(model, 2, partition="uniform", schedule="interleaved")
    assert [str(span) for span in chunks.stages[0].layers] == ["0-1", "4-5"]
    assert (plain.bubble, chunks.bubble) == pytest.approx((1 / 9, 1 / 17))
    assert chunks.stages[0].weights == plain.stages[0].weights
    assert chunks.stages[1].work == pytest.approx(plain.stages[1].work)
    held = [run.stages[0].memory.activations for run in (plain, chunks)]
    assert 1.25 * held[0] <= held[1] < 1.35 * held[0]  # 5 passes of 2 layers, not 2 of 4
    assert "0-1, 4-5" in report(chunks)
    assert 'schedule = "1f1b"' in told(chunks, 2, plain.peak)


@pytest.mark.parametrize(("adapter", "copies"), [(None, 2), (LORA, 1)], ids=["full", "LoRA"])
def test_pairs_take_two_places_and_the_reference_of_full_fine_tuning_its_weights(
    model, adapter, copies
):
    plain = planned(model, 2, adapter=adapter, micro_batch_size=2).stages[0].memory
    pairs = planned(model, 2, adapter=adapter, objective={"kind": "dpo"}).stages[0].memory
    assert pairs.weights == copies * plain.weights
    assert pairs.masks == plain.masks == 0
    assert plain.activations < pairs.activations < 1.5 * plain.activations


def test_masks_count_where_documents_have_no_bounds(model):
    assert planned(model, 2).stages[0].memory.masks == 0
    plain = planned(model, 2, kernels="torch").stages[0]
    assert plain.memory.masks > 0


def test_recomputation_takes_less_memory_and_more_work(model):
    kept, again = planned(model, 2), planned(model, 2, activation_checkpointing="full")
    between = planned(model, 2, activation_checkpointing="selective")
    assert again.peak < between.peak < kept.peak
    attention = planned(model, 2, activation_checkpointing="attention")
    assert again.peak < attention.peak < between.peak
    assert sum(s.work for s in attention.stages) < sum(s.work for s in again.stages)
    assert sum(s.work for s in again.stages) > 1.2 * sum(s.work for s in kept.stages)


def test_what_makes_it_fit_is_said_and_does(model):
    run = planned(model, 2, gpus=4, adapter=LORA)
    limit = 0.75 * run.peak
    text = told(run, 4, limit)
    assert f"Does not fit: the fullest stage takes {run.peak / GIB:.2f}" in text
    assert 'activation_checkpointing = "full"' in text
    again = planned(model, 2, gpus=4, adapter=LORA, activation_checkpointing="full")
    assert again.peak <= limit
    assert "Fits" in told(again, 4, limit)


def test_quantized_weights_take_what_they_will(model):
    plain, smaller = (planned(model, 2, adapter=LORA, quantization=q) for q in (None, NF4))
    stage = build_stage(smaller.config, 0, CPU).stage
    held = sum(tensor.nbytes for name, tensor in stage.named_buffers() if ".quantized_" in name)
    size = smaller.plan.size.parts(smaller.stages[0].layers[0], 0, 2)
    assert sum(part.quantized_bytes for part in size) == pytest.approx(held, rel=0.03)
    saved = 2 * sum(part.quantized for part in size) - sum(part.quantized_bytes for part in size)
    memory, without = smaller.stages[0].memory, plain.stages[0].memory
    assert without.weights - memory.weights == pytest.approx(saved)
    text = told(plain, 2, (plain.peak + smaller.peak) / 2)
    assert 'quantization = { backend = "bnb", double_quantization = true }' in text


@pytest.mark.parametrize("quantization", [None, NF4], ids=["plain", "NF4"])
def test_weights_in_host_memory_are_left_out(tmp_path, quantization):
    """By as much as a stage that is built with them has less on its device."""
    changes = {"hidden_size": 64, "intermediate_size": 1024, "num_hidden_layers": 8}
    wide = save_tiny("llama", tmp_path / "wide", **changes)
    settings = {"adapter": LORA, "quantization": quantization, "dtype": "bfloat16"}
    whole, offloaded = (planned(wide, 2, weight_offload=w, **settings) for w in ("none", "mlp"))
    stage = build_stage(offloaded.config, 0, CPU).stage
    offload = stage.weight_offload
    places = {place.untyped_storage().data_ptr() for place in offload.places}
    tensors = [*stage.parameters(), *stage.buffers()]
    others = sum(t.nbytes for t in tensors if t.untyped_storage().data_ptr() not in places)
    held = others + sum(place.nbytes for place in offload.places)
    assert offloaded.stages[0].memory.weights == pytest.approx(held, rel=0.03)
    saved = whole.stages[0].memory.weights - offloaded.stages[0].memory.weights
    hosts = offload.source.held
    at_host = sum(host.nbytes for host in hosts.values())
    assert saved == pytest.approx(at_host * (1 - 2 / len(hosts)), rel=0.03)


def test_an_embedding_in_host_memory_is_left_out(model):
    kept, moved = (planned(model, 2, adapter=LORA, embedding_on_cpu=on) for on in (False, True))
    embedding = COMMON["vocab_size"] * COMMON["hidden_size"] * 2
    assert kept.stages[0].memory.peak - moved.stages[0].memory.peak == embedding
    assert kept.stages[1].memory.peak == moved.stages[1].memory.peak
    assert "embedding_on_cpu = true" in told(kept, 2, (kept.peak + moved.peak) / 2)


@pytest.mark.parametrize(
    "family", ["mixtral", "gemma3_text", pytest.param("gemma2", marks=pytest.mark.exhaustive)]
)
def test_families_with_experts_or_several_tables_are_planned(family, tmp_path):
    run = planned(save_tiny(family, tmp_path / family), 2, adapter=LORA)
    assert all(stage.memory.activations > 0 for stage in run.stages)


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * GIB), ("80 GB", 80e9), ("1.5gib", 1.5 * GIB), ("7", 7)]
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


def test_a_size_that_is_none_is_named():
    with pytest.raises(ConfigError, match="--memory lots: not a size"):
        parse_size("lots")


def test_the_command_needs_a_config_alone(tmp_path, capsys):
    """Llama's 8B shape over 4 GPUs, from config.json."""
    model = tmp_path / "llama-8b"
    model.mkdir()
    settings = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336}
    settings |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    settings |= {"vocab_size": 128256, "tie_word_embeddings": False}
    (model / "config.json").write_text(json.dumps(settings))
    (tmp_path / "train.toml").write_text(
        f"""
        model = "{model}"
        output_dir = "unused"
        pipeline_stages = 4
        gradient_accumulation_steps = 16
        datasets = [{{ path = "unused" }}]
        optimizer = {{ lr = 1e-4 }}
        """
    )
    with pytest.raises(SystemExit) as ended:
        arguments = ["--gpus", "8", "--sequence-len", "4096", "--memory", "10GiB"]
        cli.main(["plan", str(tmp_path / "train.toml"), *arguments])
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert "0-8" in printed
    assert "2 replica(s)" in printed
    assert "Does not fit" in printed


def test_each_kind_of_layer_is_counted_by_itself(tmp_path):
    save_tiny_type(architecture_for("nemotron_h", tiny=True), tmp_path)
    config = config_of(tmp_path, 1, LORA, dtype="float32", kernels="torch", router_loss=0.0)
    plan = make_plan(config, read_architecture(tmp_path))
    predicted, longer = (
        layer_activations(plan, config, torch.float32, tokens) for tokens in (TOKENS, 1024)
    )
    assert list(predicted.kinds) == [0, 1, 2, 3]  # Mamba, experts, attention, MLP
    assert len({predicted.kept_of(layer, None) for layer in range(4)}) == 4
    assert longer.kept_of(0, None) < 1024 / TOKENS * predicted.kept_of(0, None) * 1.1

    stage = build_stage(config, 0, CPU, plan).stage
    weights = {t.untyped_storage().data_ptr() for t in (*stage.parameters(), *stage.buffers())}
    hidden = torch.randn(1, TOKENS, 64, requires_grad=True)
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    documents = find_documents([[TOKENS]], [TOKENS], CPU)
    arguments = stage.arguments_of_layer(0, None, torch.arange(TOKENS)[None], None, documents)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        stage.layer_functions.plain(stage.layers[0], hidden, arguments)
    assert predicted.kept_of(0, None) == sum(size for size, _ in kept.values())


def test_ranks_that_share_rows_keep_a_share_of_the_activations(model):
    """The model has 2 key heads beside 4: for 4 ranks each is held twice."""
    whole, halves, quarters = (
        planned(model, 1, gpus=4, adapter=LORA, sequence_parallel=ranks) for ranks in (1, 2, 4)
    )
    memory = [run.stages[0].memory for run in (whole, halves, quarters)]
    assert memory[1].activations == pytest.approx(memory[0].activations / 2, rel=0.01)
    assert memory[0].activations / 4 < memory[2].activations < memory[0].activations / 3
    assert memory[1].weights == memory[0].weights
    assert [run.replicas for run in (whole, halves, quarters)] == [4, 2, 1]
    assert "2 replica(s), whose rows 2 ranks share." in report(halves)
    assert more_slices(whole, 4) == [2, 4]


def test_slices_shorten_the_bubble_and_keep_keys_in_place_of_activations(model):
    """8 micro-batches over 4 stages; the first holds 7 quarters where it held 4."""
    whole, sliced, again, sliced_again = (
        planned(model, 4, gpus=4, adapter=LORA, **settings)
        for settings in (
            {},
            {"sequence_slices": 4},
            {"activation_checkpointing": "full"},
            {"activation_checkpointing": "full", "sequence_slices": 4},
        )
    )
    assert (whole.bubble, sliced.bubble) == (3 / 11, 3 / 35)
    first = [run.stages[0].memory for run in (whole, sliced, again, sliced_again)]
    assert 7 / 16 < first[1].activations / first[0].activations < 0.6
    keys = 2 * 2 * 8 * TOKENS * 2  # of 2 key heads of 8, in bfloat16
    boundary = 32 * TOKENS * 2
    layers = sum(map(len, sliced_again.stages[0].layers))
    held = 7 / 4 * boundary * (layers + 2)  # and on their way between stages
    recomputed = whole.activations.kept_of(0, None) / 4
    assert first[3].activations == pytest.approx(
        held + recomputed + layers * keys * (3 + 3 / 4), rel=1e-6
    )
    assert "rows in 4 slices" in report(sliced)
    assert first[1].logits <= first[0].logits


def test_tiles_leave_a_part_of_the_mlp_in_memory_and_run_it_once_more(model):
    """A layer's MLP has 40 wide intermediates, of each of which a tile has a quarter."""
    again = {"adapter": LORA, "activation_checkpointing": "full", "kernels": "torch"}
    whole, tiled = (planned(model, 1, gpus=1, tiles=tiles, **again) for tiles in (1, 4))
    kept, left = (run.activations.kept_of(0, None) for run in (whole, tiled))
    assert left < kept - 2 * 40 * TOKENS * 2, "gate and up are left out"
    assert tiled.activations.tile == pytest.approx((kept - left) / 4)
    memory = [run.stages[0].memory.activations for run in (whole, tiled)]
    assert memory[0] - memory[1] == pytest.approx((kept - left) * 3 / 4)
    layers = len(whole.stages[0].layers[0])
    assert tiled.stages[0].work - whole.stages[0].work == 2 * layers * 3 * 32 * 40


def test_states_that_are_shared_out_or_in_host_memory_leave_the_gpu(model):
    whole, shared, offloaded = (
        planned(model, 2, gpus=8, optimizer={"lr": 1.0, **how}).stages[0].memory.optimizer
        for how in ({}, {"shard": True}, {"offload": True})
    )
    assert shared == pytest.approx(whole / 4)
    assert offloaded == whole, "a bucket holds all of so small a model"
    numbers = state_bytes(config_of(model, optimizer={"lr": 1.0, "offload": True}), 10**9, 0, 4, 1)
    assert numbers == 3 * 2**26 * 4 * 2


class Corrected(nn.Module):
    """A layer that adds a buffer, as routers of DeepSeek-V3 do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("correction", torch.zeros(8))

    def forward(self, hidden):
        return torch.sigmoid(self.linear(hidden) + self.correction)


def test_a_layer_that_holds_a_buffer_is_traced():
    with FakeTensorMode():
        hidden = torch.zeros(4, 8, requires_grad=True)
        assert run_as_compiled(Corrected(), hidden, {}).shape == (4, 8)
