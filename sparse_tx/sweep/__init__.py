"""Sweeps (-m): the space of members, running each in a folder of its own, searching, and the table at the end.

Hydra's grammar and its composition are used as they are; its sweepers and launchers are not. They start every member
again after an interrupt, end a search with its first failure, and the one for Optuna pins a version of 2021.
"""
