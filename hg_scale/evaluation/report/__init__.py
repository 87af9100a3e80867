"""The HTML report of a run, or a comparison of several, in one self-contained file.

`run_folder` reads the files of a run, `curves` derives the plotted columns, `charts` and `drawing`
compute the geometry of the pictures, `tables` the cards and tables, and `page` fills the templates.
What a run lacks is left out; only a folder that is not a run is an error.
"""
