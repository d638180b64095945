"""Evaluation of a model on labelled cases."""
