"""What the configs of other systems become here."""
