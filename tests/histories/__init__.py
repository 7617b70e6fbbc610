"""Proof that the API keeps its promises through faults: histories, and a judge of them.

Clients (``clients.py``) work on a cell while faults are done to it (``faults.py``); all that they
asked and were answered is a history (``record.py``), which is judged (``judge.py``) against what
the API promises (``promises.py``). Nothing here imports anything of the product, so that no fault
of the product can hide in the proof: a cell is known by its API's documentation and by what
``./dev lab status --json`` prints.

    python -m tests.histories record --seed 7 --log FILE      work on the lab, with two faults
    python -m tests.histories judge FILE                      the verdict
"""
