"""One module per benchmark; each has ``run(quick, say)`` and returns a :class:`laconic.bench.figure.Figure`."""
