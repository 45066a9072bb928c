"""`compresskv profile import`: a profile from the files published with CompressKV."""

from pathlib import Path
from typing import Annotated

import typer

from compresskv.cli.options import OutputOption
from compresskv.cli.outputs import check_outputs, check_writable
from compresskv.cli.terminal import err, out
from compresskv.errors import ConfigError, ProfileError, told

IMPORT_EPILOG = """\b
Examples:
  compresskv profile import --published Llama-3.1-8B-Instruct
  compresskv profile import --heads heads.json --layers layers.json \\
      --head-scores scores.json --model org/name
"""


def import_profile(
    published: Annotated[
        str | None,
        typer.Option(
            help="A model of which files were published: Llama-3.1-8B-Instruct, Mistral-7B-Instruct-v0.3 or "
            "Qwen2.5-7B-Instruct. They are fetched.",
            metavar="MODEL",
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="With --published: where its files lie, so that nothing is fetched.", metavar="FOLDER"),
    ] = None,
    heads: Annotated[
        Path | None, typer.Option(help="JSON: for each layer, query heads, best first.", metavar="FILE")
    ] = None,
    layers: Annotated[
        Path | None, typer.Option(help="JSON: for each data set, an error for each layer.", metavar="FILE")
    ] = None,
    head_scores: Annotated[
        Path | None,
        typer.Option(
            help="JSON: raw traditional scores, for methods that compare heads of different layers.", metavar="FILE"
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="The id that the model is loaded by, such as org/Llama-3.1-8B-Instruct. Default with --published: "
            "its id on the hub.",
            metavar="MODEL",
        ),
    ] = None,
    output: OutputOption = None,
) -> None:
    """Make a profile from the files published with CompressKV."""
    files = {"heads": heads, "layers": layers, "head_scores": head_scores}
    _check_source(published, folder, files, model)
    check_outputs({"output": output}, {**files, "folder": folder, "model": model})
    place = None if output is None else check_writable("output", output, kind="JSON")
    from compresskv.profiles import store
    from compresskv.profiles.authors import find_published, published_files
    from compresskv.profiles.published import import_published

    if published is None:
        assert heads is not None
        assert layers is not None
        assert model is not None
        imported = import_published(heads, layers, model, head_scores)
    else:
        model_id = model or find_published(published).hub_id
        try:
            with published_files(published, folder) as (own_heads, own_layers, own_scores):
                imported = import_published(own_heads, own_layers, model_id, own_scores)
        except ProfileError as error:
            if error.option not in files:
                raise
            problem = f": {told(repr(error.value), error.problem)}"  # a file that was found, not given
            option, value = ("published", published) if folder is None else ("folder", str(folder))
            raise ProfileError(problem, option=option, value=value) from error
    path = place or store.user_folder() / f"imported-{imported.model_id.replace('/', '--')}.json"
    store.write_profile(imported, path)
    out.print(str(path))
    if imported.comparable_scores is None:
        methods = "blend and vote, which compare heads of different layers, need head scores, too"
        err.print(f"It holds ranks within layers: {methods}, or a measured profile.")


def _check_source(published: str | None, folder: Path | None, files: dict[str, Path | None], model: str | None) -> None:
    """Refuse a name beside files, a folder without a name, and files without one another.

    Raises:
        ConfigError: naming the option.
    """
    if published is not None:
        for option, path in files.items():
            if path is not None:
                problem = f"cannot be given beside published={published!r}, which names all its files"
                raise ConfigError(problem, option=option, value=str(path))
        return
    if folder is not None:
        raise ConfigError("holds files of a published=NAME: give that, too", option="folder", value=str(folder))
    for option, value in {"heads": files["heads"], "layers": files["layers"], "model": model}.items():
        if value is None:
            raise ConfigError("is missing: give heads, layers and model, or published=NAME", option=option)
