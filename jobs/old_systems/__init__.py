"""Tables of what keys and flags of other systems stand for here, one file or more for each."""
