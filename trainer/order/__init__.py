"""The order of rows, their packing into sequences, epochs and run length. Imports no torch."""
