"""The real model that the integration tests share."""

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskv.models.load import load


@pytest.fixture(scope="session")
def embedded_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The default model from the machine's own cache: a first run fetches it, later runs are offline."""
    return load(device="cpu")
