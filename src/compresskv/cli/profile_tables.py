"""What `compresskv profile` prints of a profile."""

from typing import TYPE_CHECKING, Any

from rich.table import Table

from compresskv.cli.terminal import counted, new_table, out

if TYPE_CHECKING:
    from compresskv.profiles.profile import Profile


def print_heads(profile: "Profile") -> None:
    """The twenty best heads, or that an imported profile does not know them."""
    if profile.comparable_scores is None:
        out.print(f"{profile.model_id}: imported; its heads are ranked within each layer only")
        return
    scores = dict(zip(profile.layer_indices, profile.comparable_scores, strict=True))
    num_runs, kind = profile.num_runs, "semantic"
    if not num_runs:
        num_runs, kind = profile.provenance.get("traditional_runs") or 0, "traditional"
    mean = f" (mean of {counted(num_runs, 'run')})" if num_runs else ""
    out.print(f"{profile.model_id}: best heads{mean}")
    columns = ("rank", "layer", "head", f"{kind} score")
    table = new_table(*columns, numbers=columns)
    for rank, (layer, head) in enumerate(profile.best_heads[:20], start=1):
        table.add_row(str(rank), str(layer), str(head), f"{scores[layer][head]:.3f}")
    out.print(table, soft_wrap=False)


def print_stores(profile: "Profile") -> None:
    """What packed stores lose, where that was measured."""
    if profile.store_losses:
        losses = ", ".join(f"{name} {loss:.3g}" for name, loss in profile.store_losses.items())
        out.print(f"\nstores, nats per token lost where all tokens are kept: {losses}")
    if profile.document_losses:
        shares = {f"{100 * float(share):g} %": loss for share, loss in profile.document_losses.items()}
        losses = ", ".join(f"{share} {loss:.3g}" for share, loss in shares.items())
        out.print(f"nats per token lost where 'forecast' keeps so many of a document's tokens, not packed: {losses}")


def layer_table(profile: "Profile", tokens: list[int]) -> Table:
    """A row a layer: its best heads, its share of the errors, and its tokens."""
    table = new_table("layer", "best 4 heads", "error", "tokens", numbers=("layer", "error", "tokens"))
    for layer, error, count in zip(profile.layer_indices, profile.layer_errors, tokens, strict=True):
        heads = ", ".join(map(str, profile.top_heads(layer, 4)))
        table.add_row(str(layer), heads, f"{error:.4f}", str(count))
    return table


def answers(runs: list[dict[str, Any]]) -> Table:
    """What a model said that found no needle."""
    numbers = ("tokens", "depth", "recall")
    table = new_table("needle", *numbers, "answer", numbers=numbers, title="what the model answered")
    for run in runs[:20]:
        table.add_row(
            run["needle"], str(run["length"]), f"{run['depth']:g} %", f"{run['recall']:.2f}", run["answer"][:120]
        )
    return table
