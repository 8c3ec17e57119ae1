"""Ask TRL's DPOTrainer and KTOTrainer for losses and gradients of the cases, and keep them here.

Run by hand where TRL is installed beside Headrace: it is no dependency of the tests.

    pip install --constraint constraints.txt trl==1.16.0
    python tests/support/make_pair_fixtures.py
"""

import json
import tempfile
from pathlib import Path

import torch
import trl
from datasets import Dataset
from pair_cases import (
    KINDS,
    KTO_LOSSES,
    LOSSES,
    RANK,
    VOCABULARY,
    make_answers,
    make_pairs,
    move,
    probe,
    save_model,
)
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

FIXTURE = Path(__file__).with_name("pair_losses.json")


def tokenizer():
    """Any one: the cases are token ids."""
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")


def answer(directory, work, kind, loss_types, weights, beta):
    """Loss, rewards and gradients of one case."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    trainer = DPOTrainer(
        model=model,
        ref_model=None if kind == "lora" else AutoModelForCausalLM.from_pretrained(directory),
        args=DPOConfig(
            output_dir=str(work),
            loss_type=loss_types,
            loss_weights=weights,
            beta=beta,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
        ),
        train_dataset=Dataset.from_list([{"prompt": "w3", "chosen": "w4", "rejected": "w5"}]),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
        if kind == "lora"
        else None,
    )
    policy = trainer.model.train()
    move(kind, [item for item in policy.named_parameters() if item[1].requires_grad])
    rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in make_pairs()]
    loss = trainer.compute_loss(policy, trainer.data_collator(rows))
    loss.backward()
    metrics = {key: values[-1] for key, values in trainer._metrics["train"].items()}
    return {
        "loss": loss.item(),
        "chosen_reward": metrics["rewards/chosen"],
        "rejected_reward": metrics["rewards/rejected"],
        "accuracy": metrics["rewards/accuracies"],
        "gradients": gradients(policy),
    }


def gradients(policy):
    """Three numbers of each gradient."""
    named = policy.named_parameters()
    return {name: probe(value.grad) for name, value in named if value.grad is not None}


def answer_of_kto(directory, work, kind, beta, settings):
    """Loss, baseline, rewards and gradients of one case."""
    rows = [{"prompt": "w3", "completion": "w4", "label": label} for label in (True, False)]
    trainer = KTOTrainer(
        model=AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32),
        ref_model=None if kind == "lora" else AutoModelForCausalLM.from_pretrained(directory),
        args=KTOConfig(
            output_dir=str(work),
            beta=beta,
            per_device_train_batch_size=len(make_answers()),
            train_sampling_strategy="sequential",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            **settings,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
        if kind == "lora"
        else None,
    )
    policy = trainer.model.train()
    move(kind, [item for item in policy.named_parameters() if item[1].requires_grad])
    answers = make_answers()
    rows = [{"prompt_ids": p, "completion_ids": c, "label": label} for p, c, label in answers]
    if trainer.calculate_KL:
        for number, row in enumerate(rows):
            row["KL_completion_ids"] = rows[number - 1]["completion_ids"]
    loss = trainer.compute_loss(policy, trainer.data_collator(rows))
    loss.backward()
    metrics = {key: values[-1] for key, values in trainer._metrics["train"].items()}
    return {
        "loss": loss.item(),
        "baseline": beta * metrics["kl"],
        "chosen_reward": metrics["rewards/chosen"],
        "rejected_reward": metrics["rewards/rejected"],
        "gradients": gradients(policy),
    }


def main():
    with tempfile.TemporaryDirectory() as work:
        directory = save_model(Path(work) / "model")
        answers = {
            f"{kind}, {name}": answer(directory, work, kind, types, weights, settings["beta"])
            for kind in KINDS
            for name, (settings, types, weights) in LOSSES.items()
        }
        kto = {
            f"{kind}, {name}": answer_of_kto(directory, work, kind, settings["beta"], further)
            for kind in KINDS
            for name, (settings, further) in KTO_LOSSES.items()
        }
    found = {"trl": trl.__version__, "answers": answers, "kto": kto}
    FIXTURE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
