"""Coverage-guided fuzzing of the readers of NIfTI, gzip, manifests and golden windows.

    pip install '.[fuzz]'
    python -m tests.fuzz nifti -max_total_time=600

runs Atheris (https://github.com/google/atheris), whose options are those of libFuzzer, from the
files in `corpus/`. The tests replay these files without Atheris.
"""
