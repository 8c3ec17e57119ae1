"""A readable file over bytes that lie elsewhere: what is to be known of a position in it."""

import io


class SeekableFile(io.RawIOBase):
    """Says where one stands; a subclass reads from `position` on and moves it.

    Args:
        size: bytes of the whole file.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = base + offset
        return self.position
