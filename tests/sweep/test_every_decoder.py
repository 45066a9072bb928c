"""Every type of model that transformers can build as a causal language model, or as one of images and text.

Not part of the suite: `pytest tests/sweep --sweep` takes some minutes, `--write-models` renews docs/models.md.
"""

import functools
import tempfile
from pathlib import Path

import pytest
from page import PATH, updated

import decoders
import shrunk
import verbs

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers says of unusual configs is none of ours

examine = functools.cache(decoders.examine)


@functools.cache
def said_of(model_type: str) -> verbs.Said:
    """What the verbs say of a type; of one that cannot be tried, nothing."""
    if examine(model_type).word == "untried":
        return {}
    with tempfile.TemporaryDirectory() as folder:
        return verbs.try_verbs(verbs.saved(model_type, Path(folder)))


@pytest.mark.parametrize("model_type", shrunk.types())
def test_it_works_or_is_refused_in_one_line(model_type: str) -> None:
    examine(model_type)


@pytest.mark.parametrize("model_type", shrunk.types())
def test_verbs_run_or_say_what_the_cache_says(model_type: str) -> None:
    reason = examine(model_type).reason
    for verb, line in said_of(model_type).items():
        if verb != "load":
            assert line == reason or (verb == "profile" and verbs.NO_GROUPS in line), verb


def test_the_page_is_up_to_date(request: pytest.FixtureRequest) -> None:
    page = PATH.read_text(encoding="utf-8")
    types = shrunk.types()
    made = updated(page, {one: examine(one) for one in types}, {one: said_of(one) for one in types})
    if request.config.getoption("--write-models"):
        PATH.write_text(made, encoding="utf-8")
    else:
        assert made == page, "make it anew: pytest tests/sweep --sweep --write-models"
