"""What attribution costs: measured by phase and layer (`report`), and said before anything is read (`plan`).

`clock` and `memory` measure a pass; `work` says how many operations and bytes a phase is; `ceilings` what a
machine can do at most; `predict` makes seconds of the two. `planning`, `report`, `chrome` and `command` show
it.
"""
