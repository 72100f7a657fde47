"""Trained classifiers as files."""
