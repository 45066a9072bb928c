"""Measure a model: retrieval scores of every head, then the eviction error of every layer.

Both take the same documents, prefilled once for all their questions. Layer errors need the heads that the scores
choose, so they come second, on a few documents that are read again.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresskv.attention.routing import routing
from compresskv.attention.support import check_supported
from compresskv.calibration.centres import find_centres
from compresskv.calibration.measure import Measurement, mean_scores
from compresskv.calibration.replays import fit_replays
from compresskv.calibration.runs import measuring_alone
from compresskv.calibration.settings import CalibrationSettings
from compresskv.errors import ConfigError, ModelError
from compresskv.methods.forecast import Forecast
from compresskv.models.fingerprint import fingerprint
from compresskv.models.quantize import weights_dtype
from compresskv.models.shape import compressible_layers, decoder_config, heads_of
from compresskv.profiles.layer_errors import combined
from compresskv.profiles.profile import Profile
from compresskv.prompts.prompt import context_length
from compresskv.system.libraries import versions
from compresskv.system.progress import Progress, silent


@dataclass
class Outcome:
    """A finished calibration."""

    profile: Profile
    runs: list[dict[str, Any]] = field(repr=False)


def find_profile(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    model_id: str,
    log_folder: Path,
    settings: CalibrationSettings | None = None,
    on_progress: Progress | None = None,
) -> Outcome:
    """Calibrate `model`.

    Args:
        log_folder: keeps each finished run, so that a killed calibration goes on where it stopped.
        settings: None: the default ones, without the lengths above the model's context.
        on_progress: called with (what is being done, the fraction done).
    Raises:
        ConfigError: lengths above the model's context.
        ModelError: the model cannot be profiled: no GQA, NaN, an unsupported architecture.
        DataError: the haystack is too short.
        ProfileError: the model never retrieves a needle (`NothingRetrievedError`).
    Source: CompressKV (arXiv 2508.02401), sections 3.1 and 3.3. Differs: needles share documents, and the text is
    neither LongBench's nor any other benchmark's.
    """
    chosen = settings or CalibrationSettings().fitted(context_length(model))
    _check_model(model, chosen)
    report = on_progress or silent
    with measuring_alone(log_folder, str(fingerprint(model)), report), routing(model):
        profiler = Measurement(model, tokenizer, log_folder, chosen, report)
        runs = profiler.measure_heads()
        semantic, traditional, num_runs = mean_scores(runs)
        errors = profiler.measure_errors(semantic)
        replay_weights = fit_replays(model, profiler.replay_prompts(), report)
        query_centres = find_centres(model, profiler.replay_prompts(), report)
        profile = Profile(
            model_id=model_id,
            fingerprint=profiler.fingerprint,
            layer_indices=tuple(compressible_layers(model)),
            semantic_scores=semantic,
            traditional_scores=traditional,
            num_runs=num_runs,
            layer_errors_by_set=errors,
            layer_errors=combined(errors),
            provenance=_provenance(model, profiler, runs),
            replay_weights=replay_weights,
            query_centres=query_centres,
        )
        stores, shares = profiler.measure_losses(Forecast().with_profile(profile))
    return Outcome(replace(profile, store_losses=stores, document_losses=shares), runs)


def _check_model(model: PreTrainedModel, settings: CalibrationSettings) -> None:
    check_supported(model)
    heads = heads_of(decoder_config(model), compressible_layers(model)[0])
    if heads.num_kv_heads >= heads.num_query_heads:
        raise ModelError(
            f"{type(model).__name__} has no grouped-query attention ({heads.num_kv_heads} KV heads for "
            f"{heads.num_query_heads} query heads): semantic retrieval heads are defined for GQA; use 'snapkv'"
        )
    limit = context_length(model)
    if limit is not None and max(settings.lengths) > limit:
        problem = f"is above the model's context of {limit} tokens"
        raise ConfigError(problem, option="lengths", value=max(settings.lengths))


def _provenance(model: PreTrainedModel, profiler: Measurement, runs: list[dict[str, Any]]) -> dict[str, Any]:
    succeeded = sum(run["succeeded"] for run in runs)
    return {
        "settings": asdict(profiler.settings),
        "needles": [needle.id for needle in profiler.needles],
        "haystack_sha256": profiler.text_digest,
        "decoding": "greedy, so no seed",
        "runs_succeeded": succeeded,
        "runs_failed": len(runs) - succeeded,
        "dtype": weights_dtype(model),
        "versions": versions(),
    }
