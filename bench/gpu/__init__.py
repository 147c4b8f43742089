"""``python -m bench gpu``: all checks and measurements that need a GPU, within a time limit of a few minutes.

``stages.py`` lists the stages in order; each is a module with a function ``run(context)``. ``schedule.py`` runs them one after the other,
each in its own process (``worker.py``) with a time limit. ``context.py`` defines what a stage receives: its device, the remaining time and
where to send its records. ``records.py`` defines a record, ``summary.py`` prints the final table, and ``rehearsal.py`` lets a CPU stand in
for the GPU.

The records are a stage's only output; ``python -m bench report`` generates documents from them.
"""

REHEARSAL = "DFKD_FAST_REHEARSAL"
"""Environment variable that is set in the workers of a rehearsal, where a CPU stands in for the GPU."""
