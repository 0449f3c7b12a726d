"""Fuzzing: one module a target, whose docstring begins with its invariant and whose `run` holds it.

`run(data)` returns where the invariant holds and raises where it does not. `make fuzz` searches
with atheris for hours (`__main__`), `test_fuzz` replays what was found and mutates it a little at
every run of the suite, without atheris.
"""

TARGETS = ("session_packets", "entry", "disk_files", "settings_file", "rpc")
