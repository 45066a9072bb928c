"""Prompts out of documents and questions, and where each part's tokens lie."""
