"""Input files: found, opened, cut among workers, and read into records."""
