"""What is used where nothing is said."""

METHOD = "blend"
BUDGET = 256
MODEL = "smollm2-135m"
