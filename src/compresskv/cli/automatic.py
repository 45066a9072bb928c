"""How a budget that a prompt decided is told of."""

from compresskv.selection.auto_budget import AutoChoice

_WHY = {
    "loss": "the fewest that lose no more than {allowed} nats a token by prediction ({predicted})",
    "least": "no prompt keeps fewer; predicted to lose {predicted} nats a token, {allowed} allowed",
    "at_most": "the most that is allowed, though {predicted} nats a token are lost by prediction, not {allowed}",
    "all": "nothing can go without a predicted loss above {allowed} nats a token",
}


def why(choice: AutoChoice | None) -> str:
    """What follows the number of tokens that are kept."""
    if choice is None:
        return ""
    reason = _WHY[choice.why].format(allowed=f"{choice.max_loss:g}", predicted=f"{choice.predicted_loss:.2g}")
    return f", {reason}"
