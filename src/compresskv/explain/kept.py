"""What a session kept of its document, beside a question that is asked of it."""

from collections.abc import Sequence

from compresskv.attention.routing import watching
from compresskv.compiled.modes import NEVER
from compresskv.explain.attended import Attended
from compresskv.explain.retention import Explanation, Report, Retention
from compresskv.explain.text import prompt_text, token_texts
from compresskv.models.decoding import OnToken
from compresskv.prompts.turns import document_start
from compresskv.sessions.answering import nbytes_behind
from compresskv.sessions.session import Session


def explain_session(
    session: Session,
    question: str,
    evidence: Sequence[str] = (),
    *,
    max_new_tokens: int = 0,
    on_token: OnToken | None = None,
) -> Report:
    """Note what each layer kept of the document; where `max_new_tokens` is above 0, answer, and note to what the
    answer's tokens attended.

    Args:
        evidence: texts of the document to mark.
        on_token: called with each token of the answer as it comes.
    Raises:
        ConfigError, PromptError: as for `Session.ask`.
    """
    facts, tokenizer = session.facts, session.tokenizer
    asked = session.tokens_of(question)
    token_ids = [*session.token_ids, *asked]
    answer, attended, cut_off = None, None, False
    if max_new_tokens > 0:
        attention = Attended(len(token_ids))
        with watching(attention):  # a compiled step would not be seen
            found = session.ask(question, max_new_tokens=max_new_tokens, compile=NEVER, on_token=on_token)
        answer, cut_off = found.answer, found.stats.cut_off
        attended = attention.shares
    behind = nbytes_behind(session.cache, len(asked))
    explanation = Explanation(
        facts.method,
        facts.budget,
        Retention.of(session.cache).followed_by(len(asked)),
        facts.kv_nbytes_full + behind,
        facts.kv_nbytes + behind,
        answer,
        cut_off,
        facts.store,
        attended=attended,
    )
    document = "".join(token_texts(tokenizer, session.token_ids))[document_start(tokenizer) :]
    text = prompt_text(tokenizer, token_ids, document, question, evidence)
    return Report(facts.model, ", ".join(facts.names) or "document", question, 0, text, (explanation,), facts.dtype)
