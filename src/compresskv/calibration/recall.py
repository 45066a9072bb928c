"""How much of a text an answer holds."""

from rouge import Rouge


def rouge_1_recall(answer: str, reference: str) -> float:
    """Share of the reference's words that the answer holds, case aside."""
    texts = [" ".join(words(text)) for text in (answer, reference)]
    return float(Rouge(metrics=["rouge-1"]).get_scores(*texts)[0]["rouge-1"]["r"]) if all(texts) else 0.0


def words(text: str) -> list[str]:
    """Lower-case words and numbers, as ROUGE compares them."""
    return "".join(char if char.isalnum() else " " for char in text.lower()).split()
