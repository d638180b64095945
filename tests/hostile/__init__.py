"""Generator of hostile inputs: files, names and values that no user means to give.

For each reader, inputs are generated from a seed and an index, read in a child process that is
watched, and judged by the promises of docs/reliability.md:

    python -m tests.hostile nifti --seed 1 --inputs 10000
"""
