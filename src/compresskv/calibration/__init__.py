"""How a model's profile is measured and checked."""
