"""Dense layers of the base model."""
