"""`dg-cache bench`: implementations of a reference cache, measured and attacked side by side.

`implementations` is the table of what is compared; a new one is one more row there. `timing`
measures, `attacks` tries what a cache must withstand, `port_calls` makes DeltaGlider's calls,
`findings` judges what was found, `report` and `chart` show it. Nothing outside a directory of its
own is touched, and no daemon but a private one is used.
"""
