"""A run goes on with another global batch, and with other data when that is asked for."""

import shutil

import pytest
from runs import STDLIB, as_toml, complete, make_shards, read_metrics, source

from headrace.schemas.shards.manifest_file import read_manifest

pytestmark = pytest.mark.slow

STOPPED_AT = 3


def train_tokens(shards):
    return read_manifest(shards).ledger.tokens_out["train"]


def steps_of(run):
    return [line for line in read_metrics(run) if line["kind"] == "train"]


def test_another_global_batch_and_added_data_lose_and_repeat_no_row(training, tiny_model, tmp_path):
    first, added = (
        make_shards(tiny_model, tmp_path / name, sources=[source(name, STDLIB / f"{name}.py")])
        for name in ("sched", "bisect")
    )
    config = training.config.read_text().replace("max_steps = 10", "epochs = 1")
    head, _, rest = config.partition("[[datasets]]")
    _, _, tables = rest.partition("[[evaluation_datasets]]")
    tables = tables[tables.index("[adapter]") :]
    training.config.write_text(f'{head}[[datasets]]\npath = "{first}"\n{tables}')
    rows = sum(shard.rows for shard in read_manifest(first).split("train"))
    start = training.run("start", checkpoint__every_steps=1, checkpoint__keep_last=99)
    whole = steps_of(start)
    assert len(whole) == -(-rows // 4) > STOPPED_AT + 2

    for name in ("wider", "other"):
        shutil.copytree(start, training.directory / name)
        for path in (training.directory / name).glob("checkpoints/step-*"):
            if path.name != f"step-{STOPPED_AT:06d}":
                shutil.rmtree(path)
    wider = steps_of(training.run("wider", 1, "--resume", gradient_accumulation_steps=6))
    assert wider[:STOPPED_AT] == whole[:STOPPED_AT]
    assert [line["first_row"] for line in wider[STOPPED_AT:]] == list(range(12, rows, 6))
    assert sum(line["tokens"] for line in wider) == train_tokens(first)

    text = training.config.read_text()
    extra = f'[[datasets]]\npath = "{added}"\n'
    training.config.write_text(text.replace("[adapter]", f"{extra}[adapter]"))
    sets = [
        part
        for key, value in {"output_dir": str(training.directory / "other"), "epochs": 2}.items()
        for part in ("--set", as_toml(key, value))
    ]
    refused = complete(training.command(1, "--resume", *sets))
    assert refused.returncode == 1
    assert "add --data-changed=continue to go on with other data" in refused.stderr
    other = training.run("other", 1, "--resume", "--data-changed", "continue", epochs=2)
    lines = steps_of(other)
    assert lines[-1]["epoch"] == 2.0
    counts = {
        name: sum(line["source_tokens"].get(name, 0) for line in lines)
        for name in ("sched", "bisect")
    }
    assert counts == {"sched": 2 * train_tokens(first), "bisect": train_tokens(added)}
    whole_batches = [line["rows_sha256"] for line in whole[: rows // 4]]
    assert [line["rows_sha256"] for line in lines[: rows // 4]] == whole_batches
