"""Text from elsewhere, as a terminal may show it."""

PICTURES = {code: chr(0x2400 + code) for code in range(32)} | {127: "\u2421"}
PICTURES |= dict.fromkeys(range(128, 160), "\ufffd")
IN_ROWS = {code: picture for code, picture in PICTURES.items() if chr(code) not in "\n\t"}


def visible(text: str) -> str:
    """Return a line without control characters, which terminals obey: each as its picture."""
    return text.translate(PICTURES)


def visible_lines(text: str) -> str:
    """Return a text of several lines, in which line ends and tabs stay."""
    return text.translate(IN_ROWS)
