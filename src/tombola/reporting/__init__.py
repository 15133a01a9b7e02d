"""The report: the results of a study on one page that works offline, and its figures as files.

The tables of the analyses pass through these modules, each a set of pure functions:

- `contents`: gathers the tables of all analyses and the records of the trainings from the store.
- `findings`: contents -> the main results, each a number with a short text.
- `tables`: table of an analysis -> the small table that a chart shows.
- `charts`: such a table -> an Altair chart. `look`: its colours, dashes, shapes and fonts, on a page or on paper.
- `sections`: contents -> the charts and tables of each analysis, with a text on how to read them.
- `page`: sections and findings -> one HTML file. `figures`: sections -> files. `watch`: serves and updates the page.
- `provenance`: contents -> commands, fields and machines, from which the results can be computed again.
- `paper`: the accuracies that the paper reports.
"""
