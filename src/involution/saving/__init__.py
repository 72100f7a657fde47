"""Saving and loading of trained classifiers."""
