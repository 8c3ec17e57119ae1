"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The config.")]
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Shard directory.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key; may be repeated."),
]
WorkerCount = Annotated[
    int | None, typer.Option("--workers", min=1, help="Processes. Default: the machine's cores.")
]
