"""The documented module entry point, `python -m headrace.jobs.cli`: the `headrace` command."""

from headrace.jobs.commands.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
