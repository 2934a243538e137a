"""What a command prints, as text made from a record."""
