"""The page of a run, or of several beside each other: one HTML file that needs nothing else.

`run_folder` reads what a run left, `curves` makes columns of it, `charts` and `drawing` the
geometry of the pictures, `tables` the rest, `page` fills the templates. What a run lacks is left
out; only what is no run folder at all is an error.
"""
