"""From shares to routes: the graph, what is reached above a threshold, and how it is told."""
