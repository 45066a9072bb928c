"""Every type of model that transformers can build as a causal language model, or as one of images and text.

Not part of the suite: `pytest tests/sweep --sweep` takes a minute or two, `--write-models` renews docs/models.md.
"""

import functools

import pytest
from page import PATH, updated

import decoders
import shrunk

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers says of unusual configs is none of ours

examine = functools.cache(decoders.examine)


@pytest.mark.parametrize("model_type", shrunk.types())
def test_it_works_or_is_refused_in_one_line(model_type: str) -> None:
    examine(model_type)


def test_the_page_is_up_to_date(request: pytest.FixtureRequest) -> None:
    page = PATH.read_text(encoding="utf-8")
    made = updated(page, {model_type: examine(model_type) for model_type in shrunk.types()})
    if request.config.getoption("--write-models"):
        PATH.write_text(made, encoding="utf-8")
    else:
        assert made == page, "make it anew: pytest tests/sweep --sweep --write-models"
