"""What is set before NCCL starts, by the cards and the shared memory of a machine."""

import logging

import pytest
import torch

from headrace.jobs.commands import machine, ranks

INFORMATION = "Model: \t\t NVIDIA {}\nIRQ:   \t\t 36\nGPU UUID: \t GPU-0\n"


def test_the_driver_tells_the_names_of_its_cards(tmp_path):
    for number, name in enumerate(["H200", "GeForce RTX 4090"]):
        (tmp_path / f"0000:{number}").mkdir()
        (tmp_path / f"0000:{number}" / "information").write_text(INFORMATION.format(name))
    assert machine.card_names(tmp_path) == ["NVIDIA H200", "NVIDIA GeForce RTX 4090"]
    assert machine.card_names(tmp_path / "none") == []


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4060 Ti"])
def test_cards_without_peer_transfers_are_told_to_nccl(name, caplog):
    with caplog.at_level(logging.INFO):
        found = machine.prepare_transfers(2, {}, [name, name])
    assert found == {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
    assert f"{name}: no peer-to-peer transfers; set NCCL_P2P_DISABLE=1" in caplog.text


@pytest.mark.parametrize("name", ["H200", "GeForce RTX 3090", "RTX 4000 Ada Generation", "L40S"])
def test_other_cards_are_left_alone(name):
    assert machine.prepare_transfers(2, {}, [f"NVIDIA {name}"] * 2) == {}


def test_what_the_user_set_stays_and_one_process_needs_nothing():
    cards = ["NVIDIA GeForce RTX 4090"]
    assert machine.prepare_transfers(1, {}, cards) == {}
    own = {"NCCL_P2P_DISABLE": "0"}
    assert machine.prepare_transfers(2, own, cards) == {"NCCL_IB_DISABLE": "1"}


def test_ranks_get_them(monkeypatch):
    cards = ["NVIDIA GeForce RTX 4090"]
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    assert ranks.rank_environment(2, 1234, cards=cards)["NCCL_P2P_DISABLE"] == "1"


@pytest.mark.parametrize(("megabytes", "told"), [(64, True), (1024, False)])
def test_little_shared_memory_is_told(megabytes, told, tmp_path):
    problem = machine.shared_memory_problem(tmp_path, {}, lambda folder: megabytes << 20)
    assert (problem is not None) is told
    if told:
        assert "holds 64 MiB" in problem
        assert "--shm-size=1g" in problem
    assert machine.shared_memory_problem(tmp_path, {"NCCL_SHM_DISABLE": "1"}) is None


def test_a_driver_whose_gpus_torch_does_not_see_is_told(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("headrace.trainer.devices.count_accelerators", lambda: 0)
    driver = tmp_path / "nvidiactl"
    assert machine.count_gpus([str(driver)]) == 0
    assert not caplog.text
    driver.touch()
    assert machine.count_gpus([str(driver)]) == 0
    assert f"{driver} is there, but PyTorch {torch.__version__} (built for " in caplog.text
