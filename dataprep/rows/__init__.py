"""One block of records to rows: filtered, split, masked, packed."""
