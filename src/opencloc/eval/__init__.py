"""Evaluation: encoders, metrics, tasks, reports."""
