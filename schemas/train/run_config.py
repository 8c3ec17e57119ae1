"""The tables that say when `headrace train` evaluates, saves, stops and records."""

from typing import Literal

from pydantic import Field

from headrace.schemas.config_model import Config, Text


class EvaluationConfig(Config):
    """`[evaluation]`."""

    before_first_step: bool = Field(True, description="Evaluate before training starts.")
    every_steps: int | None = Field(
        None, ge=1, description="Evaluate every so many steps. Default: never in between."
    )
    every_epochs: float | None = Field(
        None, gt=0, description="Evaluate every so many epochs; 0.1 is ten times an epoch."
    )
    after_last_step: bool = Field(True, description="Evaluate when training is done.")
    patience: int | None = Field(
        None,
        ge=1,
        description="Stop early after so many evaluations in a row that find no new lowest loss "
        "(over all sets, weighted by tokens). Default: never.",
    )
    prompts: list[Text] = Field(
        [],
        description="Texts that the model goes on with at each evaluation, as they stand; a chat "
        "has its markers, `<|im_start|>` and so on, up to where an answer begins.",
    )
    prompt_rows: int = Field(
        0,
        ge=0,
        description="The same with the first rows of each evaluation set: with what stands before "
        "a row's first trained token. Its own answer is shown beside.",
    )
    max_new_tokens: int = Field(128, ge=1, description="Tokens of such an answer at most.")
    temperature: float = Field(
        0.0, ge=0, description="Divides the logits; 0 takes the likeliest token."
    )

    @property
    def asks(self) -> bool:
        """Return whether prompts are answered."""
        return bool(self.prompts or self.prompt_rows)


class CheckpointConfig(Config):
    """`[checkpoint]`."""

    every_steps: int | None = Field(None, ge=1, description="Checkpoint every so many steps.")
    every_epochs: float | None = Field(None, gt=0, description="Checkpoint every so many epochs.")
    every_minutes: float | None = Field(60, gt=0, description="Checkpoint every so many minutes.")
    keep_last: int = Field(
        3, ge=1, description="Older ones are removed, after a newer one is durable."
    )
    at_end: bool = Field(
        True,
        description="`false`: a trial run that leaves neither checkpoint nor result at its end.",
    )
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Type in which the adapter or model is written at the end. `auto`: float32 for "
        "adapters, else the base model's. Checkpoints keep every bit whatever it is.",
    )
    keep_best: bool = Field(
        False,
        description="Also save after each evaluation that finds a new lowest loss, "
        "and keep that checkpoint whatever its age.",
    )
    weights_only: bool = Field(
        False,
        description="Leave the optimizer's states out of checkpoints. They are smaller, and can be "
        "converted; a run resumed from one begins with fresh states.",
    )
    node_local: bool = Field(
        False,
        description="`output_dir` lies on each machine's own disk, where its ranks keep the "
        "checkpoint files of their stages.",
    )
    background: bool = Field(
        True,
        description="Write while the next steps run, from a copy in host memory of the trained "
        "weights and optimizer states. `false`: training waits, without the copy.",
    )


class AnomalyConfig(Config):
    """`[anomalies]`."""

    on_not_finite: Literal["stop", "skip", "continue"] = Field(
        "stop",
        description="When the gradient of a step is NaN or infinite: stop before anything is "
        "updated, skip the update and go on, or take it all the same, which spoils the weights.",
    )
    spike_factor: float | None = Field(
        None,
        gt=1,
        description="A loss above so many times the mean of the last `spike_window` steps is a "
        "spike. Default: none is.",
    )
    spike_window: int = Field(20, ge=2, description="Steps that a spike is compared with.")
    on_spike: Literal["continue", "skip", "stop"] = Field(
        "skip", description="After a spike: only note it, skip the update, or stop before it."
    )

    @property
    def losses_kept(self) -> int:
        """Return the number of past losses that a run must remember."""
        return self.spike_window if self.spike_factor is not None else 0


class ReportingConfig(Config):
    """`[reporting]`: who gets the curves beside metrics.jsonl and TensorBoard."""

    to: list[Literal["wandb", "mlflow"]] = Field(
        [], description="Services, set up by their own environment variables or logins."
    )
    project: Text = Field("headrace", description="Project of wandb, experiment of mlflow.")
    name: Text | None = Field(
        None, description="Name of the run there. Default: the last part of `output_dir`."
    )
    every_steps: int = Field(
        1,
        ge=1,
        description="Steps between two reports, each of all steps since the last. Processes tell "
        "each other of losses, stops and damage only then, and wherever an evaluation or a save is "
        "due. `anomalies.spike_factor` needs every step, and gets it.",
    )
    adapter_norms_every: int = Field(
        10,
        ge=0,
        description="Steps between two that report the norms of what LoRA adapters add. 0: none "
        "does, unless `regularization.max_product_norm` needs them at every step.",
    )
    token_statistics_every: int = Field(
        0,
        ge=0,
        description="Steps between two that report entropy, accuracy, quantiles and the like of "
        "their trained tokens, as evaluations do. 0: no step does.",
    )


class ProfileConfig(Config):
    """`[profile]`: written into `profile/` of the run directory, a file for each process."""

    timeline: bool = Field(
        False, description="When each pipeline instruction of each step began and ended."
    )
    trace_step: int | None = Field(
        None, ge=1, description="Trace this step of the process with torch's profiler."
    )
