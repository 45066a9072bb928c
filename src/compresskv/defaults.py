"""What is used where nothing is said."""

METHOD = "blend"
SERVED_METHOD = "vote"
"""In vLLM, whose block table takes the same tokens in all layers."""
DECODE_METHODS = ("rkv_ahead", "rkv")
"""For what is generated: the second where the model's profile lacks what the first needs."""
SERVED_DECODE_METHOD = "rkv_shared"
BUDGET = 256
CANDIDATES = 4
"""Times its budget that a layer goes on holding while it waits for later ones."""
MODEL = "smollm2-135m"
SESSION_METHODS = ("forecast", "kvzip")
"""Of a document that is read before anything is asked: the second where the model's profile lacks what the first needs.
"""
SESSION_BUDGET = "25% of bytes"
"""Of such a document's full cache: in fewer bits a number, which `best_store` finds, that is more of its tokens."""
