"""The report: what was found in a study, on one page that needs no network; and its figures as files.

The analyses' tables flow through these modules, each a set of pure functions:

- `contents`: what a store holds of a study, gathered: the analyses' tables, and what is known of how they came about.
- `findings`: contents -> what was found, in numbers and a sentence each.
- `tables`: an analysis's table -> the small table that a chart shows and a reader reads.
- `charts`: such a table -> an Altair chart. `look`: its colours, dashes, shapes and letters, on a page or on paper.
- `sections`: contents -> the charts and tables of each analysis, with a line on how to read them.
- `page`: sections and findings -> one HTML file. `figures`: sections -> files. `watch`: the page, served and fresh.
- `paper`: the accuracies that the paper reports.
"""
