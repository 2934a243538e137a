"""Stream a source into an NF4 checkpoint: validate, pipeline, journal, record."""
