"""Labelled data sets: search, reading and splitting."""
