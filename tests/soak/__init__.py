"""The soak: many clients, many faults, and every byte compared with the truth (`make soak`).

`truth` makes the references, `client` is a user's process, `households` are daemons and who starts
them again, `faults` do harm by a schedule, `measures` looks before and after, `report` judges.
`walk` fails the system calls of a store one after another (`make faults`).
"""
