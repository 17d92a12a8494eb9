"""The process that carries runs out: it leases rows of the table of runs and drives each to its end.

leases.py    what keeps a run this worker's own, and tells it to stop
task.py      one run: from its row to its model
loop.py      the process: which runs, how many at a time, and how it drains
"""
