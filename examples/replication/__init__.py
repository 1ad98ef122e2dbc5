"""Does PATS help? A grid of fine-tuning runs: model x task x method x hyperparameters x seed.

PYTHONPATH=examples python -m replication STUDY --models DIR --data_dir DIR          # runs what is missing
PYTHONPATH=examples python -m replication STUDY --models DIR --data_dir DIR --plan   # says what that would be
PYTHONPATH=examples python -m replication.report                                     # tables and figures

`grid.py` says what a run is, `studies.py` which there are, `train.py` makes one, `lines.py` keeps them,
`report.py` reads them, `models.py` fetches the models. docs/replication.md has the method and the results.
"""
