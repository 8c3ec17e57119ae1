"""A vision family and the numbers by which it prepares pictures."""

from typing import NamedTuple

from pydantic import JsonValue

from headrace.schemas.fingerprint import fingerprint

Settings = dict[str, JsonValue]


class Processor(NamedTuple):
    """A vision family and the numbers by which it prepares pictures."""

    family: str
    settings: Settings

    @property
    def tokens(self) -> dict[str, str]:
        """Return the texts of its tokens: `marker`, which stands for a picture in a rendered chat,
        `placeholder`, which the features of pictures replace, and others around them.
        """
        tokens = self.settings["tokens"]
        assert isinstance(tokens, dict)
        return {name: str(text) for name, text in tokens.items()}

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 over family and settings, as manifests have it."""
        return fingerprint([self.family, self.settings])
