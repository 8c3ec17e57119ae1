"""Plain text: one field of a record is the document."""

from collections.abc import Iterator, Sequence

from headrace.dataprep.formats.document_ends import document_ends, encode_documents
from headrace.dataprep.formats.extraction import ExtractionError, extract_text
from headrace.dataprep.input.records import Record, Reject, find_field, top_fields
from headrace.dataprep.input.streams import refuse
from headrace.dataprep.text.row_format import Encoded
from headrace.dataprep.text.sample import Sample
from headrace.dataprep.text.tokens import TokenizerSpec
from headrace.schemas.outside_text import json_type
from headrace.schemas.prepare.source_config import SourceConfig


class TextFormat:
    """Text with BOS and EOS as the config wants them; every token is trained."""

    def __init__(self, source: SourceConfig, tokenizer: TokenizerSpec) -> None:
        self.field = source.text_field
        self.extract = source.extract
        self.space = source.add_prefix_space
        self.plain = self.extract is None and not self.space
        self.ends = document_ends(source, tokenizer)
        self.tokenizer = tokenizer
        self.columns = top_fields(source.text_field)

    def encode(self, records: Sequence[Record]) -> Iterator[Encoded | Reject]:
        """One document for each record that holds text."""
        texts = [self.take(record) for record in records]
        encoded = iter(
            encode_documents(
                self.tokenizer, [text for text in texts if isinstance(text, str)], self.ends
            )
        )
        for record, text in zip(records, texts, strict=True):
            if isinstance(text, Reject):
                yield text
                continue
            ids = next(encoded)
            yield (
                Encoded(text, [Sample(ids)])
                if len(ids)
                else refuse(record.place, "empty document", "the tokenizer gives no token")
            )

    def take(self, record: Record) -> str | Reject:
        """The text of a record."""
        text = record.fields.get(self.field)
        if self.plain and type(text) is str and text:
            return text
        try:
            text = find_field(record.fields, self.field)
        except LookupError:
            return refuse(record.place, "missing field", f'no field "{self.field}"')
        if self.extract is not None and isinstance(text, str | bytes) and text:
            try:
                text = extract_text(self.extract, text)
            except ExtractionError as error:
                return refuse(record.place, "no text", str(error))
        if not isinstance(text, str):
            detail = f'field "{self.field}" is {json_type(text)}'
            return refuse(record.place, "not a string", detail)
        if not text:
            return refuse(record.place, "empty document", "no characters")
        return f" {text}" if self.space and not text.startswith(" ") else text
