"""The format of each type of source."""

from headrace.dataprep.text.row_format import Format
from headrace.dataprep.text.tokens import TokenizerSpec
from headrace.schemas.prepare.chat_config import ChatConfig
from headrace.schemas.prepare.prepare_config import PrepareConfig
from headrace.schemas.prepare.source_config import SourceConfig


def build_format(config: PrepareConfig, source: SourceConfig, tokenizer: TokenizerSpec) -> Format:
    """Return the format of a source.

    Raises:
        ConfigError, DataError: the source's settings do not go together, or a file that they name
            cannot be used.
    """
    match source.type:
        case "text" | "documents":
            from headrace.dataprep.formats.text import TextFormat

            return TextFormat(source, tokenizer)
        case "axolotl":
            from headrace.dataprep.axolotl.build import build_axolotl_format

            return build_axolotl_format(config, source, tokenizer)
        case "chat":
            from headrace.dataprep.formats.chat import ChatFormat

            return ChatFormat(source.chat or ChatConfig(), tokenizer, config.images)
        case "pretokenized":
            from headrace.dataprep.formats.pretokenized import PretokenizedFormat

            return PretokenizedFormat(source, tokenizer)
        case "preference":
            from headrace.dataprep.formats.preference import PreferenceFormat

            return PreferenceFormat(source, tokenizer, config.images)
        case "unpaired":
            from headrace.dataprep.formats.preference import UnpairedFormat

            return UnpairedFormat(source, tokenizer, config.images)
