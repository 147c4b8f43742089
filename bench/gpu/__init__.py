"""Everything that only a GPU can check or measure, in the few minutes that one is available: ``python -m bench gpu``.

``stages.py`` lists the stages in their order; each has a file of its own with a function ``run(context)``. ``schedule.py`` runs
them one after the other, each in a process of its own (``worker.py``) with a time limit; ``context.py`` is what a stage
gets: where it runs, how much time is left, and where its records go. ``records.py`` says what a record is, ``summary.py``
prints the table, and ``rehearsal.py`` sets up a CPU to play the GPU.

A stage's records are all that comes back: ``python -m bench report`` turns them into documents.
"""

REHEARSAL = "DFKD_FAST_REHEARSAL"
"""The variable that tells a worker that a CPU plays the GPU."""
