"""Measurements, printed with the machine, the versions and the data they were made with."""
