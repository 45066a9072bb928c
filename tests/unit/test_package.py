"""What a user imports, and what it costs to import it."""

import subprocess
import sys
from pathlib import Path

import pytest

import compresskv


def test_every_public_name_can_be_imported():
    for name in compresskv.__all__:
        assert getattr(compresskv, name).__module__.startswith("compresskv.")


def test_public_names_are_those_that_type_checkers_see():
    text = Path(str(compresskv.__file__)).read_text(encoding="utf-8")
    block = text[text.index("if TYPE_CHECKING:") : text.index("_HOME")]
    assert all(name in block for name in compresskv.__all__)
    assert sorted(compresskv._HOME) == sorted(compresskv.__all__)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        compresskv.compres  # noqa: B018


def test_importing_the_package_does_not_import_torch():
    # the command line's --help would wait seconds for it
    code = "import sys, compresskv, compresskv.cli; print('torch' in sys.modules or 'transformers' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "False"
