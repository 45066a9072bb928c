"""Measure what a method loses: tasks, metrics, one prefill for every configuration, records and reports."""
