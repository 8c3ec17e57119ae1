"""`headrace push`: what is uploaded where, to a hub on loopback."""

import json

import pytest
from hub_server import Hub

from headrace.jobs import cli
from headrace.jobs.commands.push import PushError, choose, push
from headrace.schemas.errors import ConfigError, DataError


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    yield server
    server.stop()


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    (folder / "adapter").mkdir(parents=True)
    (folder / "train.json").write_text(json.dumps({"config": {}}))
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"\x00" * 100)
    (folder / "adapter" / ".lock").write_text("")
    return folder


def test_the_adapter_goes_into_a_private_repository_in_one_commit(hub, run):
    url = push(choose(run, None), "me/mine", None, "First", public=False)
    assert url.endswith("/me/mine/commit/1")
    assert list(hub.repositories.values()) == [True]
    (files,) = hub.files.values()
    assert files == {"adapter_config.json": b"{}", "adapter_model.safetensors": b"\x00" * 100}
    assert hub.messages == ["First"]


def test_a_revision_is_made_and_a_public_one_only_when_asked(hub, run):
    push(choose(run, "adapter"), "me/mine", "v2", "x", public=True)
    assert list(hub.repositories.values()) == [False]
    assert hub.branches == [("me/mine", "v2")]
    assert [revision for _, revision in hub.files] == ["v2"]


def test_a_dry_run_lists_and_touches_nothing(hub, run, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["push", str(run), "me/mine", "--dry-run"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.splitlines() == [
        "adapter_config.json: 2 bytes",
        "adapter_model.safetensors: 100 bytes",
        "102 bytes for me/mine; nothing was uploaded",
    ]
    assert hub.repositories == {}


def test_the_hubs_refusal_is_one_line(hub, run):
    hub.refuses = True
    with pytest.raises(PushError, match=r"me/mine: not uploaded \(.*403.*hf auth login"):
        push(choose(run, None), "me/mine", None, "x", public=False)
    with pytest.raises(ConfigError, match="a/b/c: "):
        push(choose(run, None), "a/b/c", None, "x", public=False)


def test_what_is_not_there_and_links_are_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="no such directory"):
        choose(tmp_path / "none", None)
    with pytest.raises(ConfigError, match="no model there"):
        choose(run, "model")
    with pytest.raises(ConfigError, match="no checkpoints"):
        choose(run, "checkpoint")
    (run / "adapter" / "secret").symlink_to("/etc/passwd")
    with pytest.raises(DataError, match="secret: is a link"):
        choose(run, "adapter")
