"""Defaults of the analyses, which the command line states in its help without loading torch."""

MARGIN = 0.005
"""By how much a ticket may be worse than the dense network and keep the accuracy, in 0..1."""

TOLERANCE = 0.02
"""The largest barrier of networks that count as connected, in 0..1: that of Frankle et al. (arXiv 1912.05671)."""

POINTS = 11
"""The number of points on a line between two networks, including both ends."""

DRAWS = 3
"""The number of random draws that an analysis without trainings takes for each comparison."""
