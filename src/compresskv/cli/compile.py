"""`compresskv compile`: build a model's compiled decode step once, so that later answers find it."""

import json
from dataclasses import asdict

from compresskv import defaults
from compresskv.cli.options import (
    DtypeOption,
    JsonOption,
    MethodOption,
    ModelOption,
    ProfileOption,
    SettingsOption,
    StoreOption,
    check_profile,
    check_timed,
    create_method,
)
from compresskv.cli.terminal import Bar, Building, err, out
from compresskv.errors import ModelError
from compresskv.selection.precision import NATIVE, find_precision

EPILOG = """\b
Examples:
  compresskv compile
  compresskv compile --model ./my-model --dtype int8
  compresskv compile --method snapkv --json
  compresskv compile --method forecast --store int8  # of a session's store
"""
_PROMPT_TOKENS = 320


def compile_step(
    model: ModelOption = defaults.MODEL,
    method: MethodOption = defaults.METHOD,
    profile: ProfileOption = None,
    store: StoreOption = NATIVE,
    settings: SettingsOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compile what a model does for each generated token, and keep it on disk.

    It takes about a minute and a C++ compiler. Answers of `ask` are then decoded by it where that pays. One is needed
    for methods whose KV heads keep equal numbers of tokens, and one for those whose heads do not; each store needs its
    own of both.
    """
    chosen = create_method(method, settings)
    check_timed("method", chosen)
    find_precision(store)
    check_profile(profile)
    from compresskv.bench.subject import real_subject
    from compresskv.bench.trial import try_compiled
    from compresskv.methods.prepare import prepare_method
    from compresskv.models.quantize import weights_dtype

    with Bar() as bar:
        subject = real_subject(model, dtype=dtype, device="cpu", on_progress=bar)
        prepared = prepare_method(subject.model, chosen, profile if chosen.needs_profile else None)
        building = Building(bar)
        tokens = subject.read_tokens(_PROMPT_TOKENS)
        trial = try_compiled(subject.model, tokens, prepared, defaults.BUDGET, store, building)
    if trial.compiled_ms is None:
        raise ModelError(f": {trial.not_compiled}", option="model", value=model)
    computed_in = weights_dtype(subject.model)
    if as_json:
        told = {"model": model, "dtype": computed_in, "method": chosen.label, "store": store, "built": building.begun}
        out.print_json(json.dumps(told | asdict(trial)))
    else:
        done = "compiled" if building.begun else "compiled before; loaded"
        err.print(f"{done} in {trial.compile_s:.1f} s")
        faster = trial.eager_ms / trial.compiled_ms
        milliseconds = f"{trial.compiled_ms:.1f} ms a token instead of {trial.eager_ms:.1f}"
        out.print(f"{milliseconds}: {faster:.1f} times as fast, in {computed_in}")
