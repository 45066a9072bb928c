"""Offline measurements of a model: which heads retrieve, which layers suffer from eviction."""
