"""How weights are rounded to a format."""
