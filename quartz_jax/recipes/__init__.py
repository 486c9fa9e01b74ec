"""What is done to which layers of a model."""
