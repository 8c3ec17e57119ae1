"""lm-eval on a result: what is loaded, what is refused, and the table that is written."""

import importlib.util
import json

import pytest
from tiny_llama import write_tiny_llama

from headrace.jobs import cli
from headrace.jobs.serve import benchmark
from headrace.schemas.errors import ConfigError

TASK = """\
task: mills
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


def test_without_the_library_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setattr(benchmark, "LIBRARY", "headrace_has_no_such_library")
    with pytest.raises(ConfigError, match=r"pip install '\.\[benchmark\]'"):
        benchmark.check_library()


def test_a_directory_is_a_run_an_adapter_or_a_model(tmp_path):
    with pytest.raises(ConfigError, match="no run, adapter"):
        benchmark.result_of(tmp_path)
    (tmp_path / "train.json").write_text("{}")
    with pytest.raises(ConfigError, match="has the run ended"):
        benchmark.result_of(tmp_path)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"base_model_name_or_path": "models/a", "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    found = benchmark.result_of(tmp_path)
    assert found == ("models/a", adapter)
    assert benchmark.arguments_of(found)["peft"] == str(adapter)
    settings["task_type"] = "SEQ_CLS"
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="writes no text"):
        benchmark.result_of(tmp_path)


@pytest.mark.exhaustive
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is an extra")
@pytest.mark.filterwarnings("ignore")
def test_a_task_of_ones_own_is_scored(tmp_path, capsys):
    model = write_tiny_llama(tmp_path / "model")
    rows = [{"question": "water", "choices": [" a b", " c"], "answer": n % 2} for n in range(4)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "mills.yaml").write_text(TASK.format(file=file))
    output = tmp_path / "found.json"
    words = ["lm-eval", str(model), "--tasks", "mills", "--task-folder", str(tasks)]
    with pytest.raises(SystemExit, match="0"):
        cli.main([*words, "--output", str(output), "--device", "cpu"])
    assert "mills" in capsys.readouterr().out
    (result,) = json.loads(output.read_text()).values()
    assert result["acc,none"] == 0.5  # the same choice for all, which is right for every other
