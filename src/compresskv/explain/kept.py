"""What a session kept of its document, beside a question that is asked of it."""

from collections.abc import Sequence

from compresskv.explain.retention import Explanation, Report, Retention, prompt_text, token_texts
from compresskv.models.decoding import OnToken
from compresskv.prompts.turns import document_start
from compresskv.sessions.session import Session


def explain_session(
    session: Session,
    question: str,
    evidence: Sequence[str] = (),
    *,
    max_new_tokens: int = 0,
    on_token: OnToken | None = None,
) -> Report:
    """Note what each layer kept of the document, and answer where `max_new_tokens` is above 0.

    Args:
        evidence: texts of the document to mark.
        on_token: called with each token of the answer as it comes.
    Raises:
        ConfigError, PromptError: as for `Session.ask`.
    """
    facts, tokenizer = session.facts, session.tokenizer
    asked = session.tokens_of(question)
    token_ids = [*session.token_ids, *asked]
    answer = None
    if max_new_tokens > 0:
        answer = session.ask(question, max_new_tokens=max_new_tokens, on_token=on_token).answer
    explanation = Explanation(
        facts.method,
        facts.budget,
        Retention.of(session.cache).followed_by(len(asked)),
        facts.kv_nbytes_full,
        facts.kv_nbytes,
        answer,
        facts.store,
    )
    document = "".join(token_texts(tokenizer, session.token_ids))[document_start(tokenizer) :]
    text = prompt_text(tokenizer, token_ids, document, question, evidence)
    return Report(facts.model, ", ".join(facts.names) or "document", question, 0, text, (explanation,), facts.dtype)
