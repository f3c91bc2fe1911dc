"""What the ops of 4-bit weights share."""

MODES = ("exact", "int8")
